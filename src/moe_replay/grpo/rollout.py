"""The station that samples: this rank's part of the step's prompts, answered by the engine.

With ``rollout.max_staleness`` a step takes what was sampled during the step before it, and has the
next one's sampled meanwhile::

    engine    R1 (v0) | R2 (v0)   | R3 (v1)      |          R3: rollout of step 3
    trainer           | step 1    | step 2       | step 3   v1: weights of 1 push
    pushes                    v1 --^          v2 --^

A push waits until the rollout beside it has ended, so each has one policy version: that of the
push before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moe_replay.engines.types import Request, RolloutGroup
from moe_replay.grpo.ahead import ROLLOUT_FOLDER, load_groups, why_dropped
from moe_replay.grpo.answers import ask_engine, check_answer, end_at_stops
from moe_replay.grpo.engines import recipe_sampling, training_request
from moe_replay.grpo.run import Run
from moe_replay.grpo.turns import converse
from moe_replay.grpo.types import Conversation, Rollout
from moe_replay.megatron.ranks.replica import Replica
from moe_replay.recipe.recipe import Recipe
from moe_replay.routing import Routing, RoutingTrace
from moe_replay.tasks.encoding import Prompt


def roll_out(run: Run, num_prompts: int) -> Rollout:
    """Sample completions for this rank's part of the next prompts, unless they are there already.

    ``num_prompts`` are those of the step, or with dynamic sampling those that it still lacks; they
    become a few more where ranks would get unequal parts.

    Raises:
        StepDropped: on every rank, when one of them was asked to stop while it samples.
    """
    recipe = run.recipe
    if num_prompts == recipe.prompts_per_step:
        own = own_prompts(recipe, run.replica)
    else:
        num_ranks = run.replica.num_replicas * run.replica.size
        num_prompts = -(-num_prompts // num_ranks) * num_ranks
        own = _part(num_prompts, 1, run.replica)
    prompts, requests = _next_prompts(run, own, num_prompts, step=run.step)
    run.next_prompt += num_prompts
    if run.ahead.is_under_way:
        run.ahead.held = run.droppable(
            lambda: _checked(run, run.ahead.wait(), requests, trained_at=run.policy_version)
        )
    held = run.ahead.take()
    conversations: tuple[Conversation, ...] = ()
    if run.inputs.environment is not None:
        mine = [prompts[index] for index in own]
        talks = converse(run, mine, requests, recipe_sampling(recipe), ask=ask_engine)
        groups, num_cut, conversations = talks.groups, talks.num_cut, talks.conversations
        # An environment may have added to prompts, which every rank of a replica trains on.
        begun = run.ranks.gather(dict(zip(own, talks.prompts, strict=True)))
        added = {index: prompt for part in begun for index, prompt in part.items()}
        prompts = [added[index] for index in range(len(prompts))]
    elif held is None:
        groups, num_cut = ask_engine(run, requests, recipe_sampling(recipe))
    else:
        groups, num_cut = end_at_stops(run, held)
    traces: dict[tuple[int, int], RoutingTrace] = {}
    bare = []
    for index, group in zip(own, groups, strict=True):
        for number, completion in enumerate(group.completions):
            if completion.trace is not None and run.mode.passes.engine is Routing.RECORD:
                traces[index, number] = completion.trace
        bare.append(
            replace(group, completions=tuple(replace(c, trace=None) for c in group.completions))
        )
    return Rollout(
        prompts=tuple(prompts),
        own=own,
        groups=tuple(bare),
        traces=traces,
        num_cut=num_cut,
        policy_version=run.policy_version,
        conversations=conversations,
    )


def begin_next(run: Run) -> None:
    """Have the rollout of the next step sampled from here on, where the run overlaps them."""
    if not run.overlaps or run.step == run.recipe.run.max_steps:
        return
    _, requests = _next_prompts(run, own_prompts(run.recipe, run.replica), step=run.step + 1)
    run.ahead.start(run.engine, requests, recipe_sampling(run.recipe))


def await_next(run: Run, *, pushes_first: bool) -> None:
    """Wait until the rollout of the next step is complete.

    ``pushes_first`` says that a push follows before that step.

    Raises:
        EngineError: on every rank, when the engine of one failed or breaks the contract.
    """
    if not run.ahead.is_under_way:
        return
    _, requests = _next_prompts(run, own_prompts(run.recipe, run.replica), step=run.step + 1)
    with run.station("rollout"):
        failure: Exception | None = None
        try:
            run.ahead.held = _checked(
                run, run.ahead.wait(), requests, trained_at=run.policy_version + pushes_first
            )
        except Exception as error:  # noqa: BLE001 - the seam: the engine may be the user's
            failure = error
        run.ranks.raise_together(failure)


def hold_saved(run: Run) -> None:
    """Hold the rollout that the checkpoint has for the next step, if the run still asks for it.

    Raises:
        CodecError: on every rank, when a file is damaged.
    """
    folder = run.checkpoints.folder(run.step) / ROLLOUT_FOLDER
    if not run.overlaps or not any(run.ranks.gather(folder.is_dir())):
        return
    _, requests = _next_prompts(run, own_prompts(run.recipe, run.replica), step=run.step + 1)
    failure, groups = None, None
    try:
        groups = load_groups(folder, requests, recipe_sampling(run.recipe), rank=run.ranks.rank)
        if groups is not None:
            groups = _checked(run, groups, requests, trained_at=run.policy_version)
    except Exception as error:  # noqa: BLE001 - the seam: raised on all ranks
        failure = error
    run.ranks.raise_together(failure)
    if all(run.ranks.gather(groups is not None)):
        run.ahead.held = groups
    else:
        run.journal.warn(
            f"{folder} {why_dropped(folder)}: step {run.step + 1} is sampled again, by the weights of the checkpoint"
        )


def _next_prompts(
    run: Run, own: Sequence[int], num_prompts: int | None = None, *, step: int
) -> tuple[Sequence[Prompt], list[Request]]:
    """Return the next prompts, by default as many as a step has, and this rank's requests.

    ``step`` is the one that trains on them.
    """
    position = run.next_prompt
    count = num_prompts or run.recipe.prompts_per_step
    prompts = run.inputs.train.at(position, count, step=step)
    return prompts, [training_request(run.recipe, position + i, prompts[i]) for i in own]


def _checked(
    run: Run, groups: list[RolloutGroup], requests: Sequence[Request], *, trained_at: int
) -> list[RolloutGroup]:
    check_answer(
        run,
        groups,
        requests,
        recipe_sampling(run.recipe),
        trained_at=trained_at,
        max_staleness=run.recipe.rollout.max_staleness,
    )
    return groups


def own_prompts(recipe: Recipe, replica: Replica) -> tuple[int, ...]:
    """Return the indices of the prompts that this rank samples: its part of its replica's.

    A replica gets an equal part of every mini-batch, so that a mini-batch holds the same prompts
    for any number of ranks. Example: 2 mini-batches of 4 prompts, 2 replicas of 2 ranks. Replica 1
    has prompts 2, 3, 6, 7 of the 8; its first rank samples 2 and 6, its second 3 and 7.
    """
    return _part(recipe.prompts_per_step, recipe.batch.steps_per_generation, replica)


def _part(num_prompts: int, num_updates: int, replica: Replica) -> tuple[int, ...]:
    per_update = num_prompts // num_updates
    per_replica = per_update // replica.num_replicas
    first = replica.number * per_replica
    shared = [
        update * per_update + first + index
        for update in range(num_updates)
        for index in range(per_replica)
    ]
    return tuple(shared[replica.own :: replica.size])
