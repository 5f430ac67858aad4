"""The station that samples: this rank's part of the step's prompts, answered by the engine."""

from __future__ import annotations

from dataclasses import replace

from moe_replay.grpo.answers import ask_engine
from moe_replay.grpo.engines import recipe_sampling, training_request
from moe_replay.grpo.run import Run
from moe_replay.grpo.types import Rollout
from moe_replay.megatron.ranks.replica import Replica
from moe_replay.recipe.recipe import Recipe
from moe_replay.routing import Routing, RoutingTrace


def roll_out(run: Run) -> Rollout:
    """Sample completions for this rank's part of the step's prompts."""
    recipe = run.recipe
    position = run.next_prompt
    prompts = run.inputs.train.at(position, recipe.prompts_per_step)
    run.next_prompt += recipe.prompts_per_step
    own = own_prompts(recipe, run.replica)
    requests = [training_request(recipe, position + index, prompts[index]) for index in own]
    groups, num_cut = ask_engine(run, requests, recipe_sampling(recipe))
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
        prompts=tuple(prompts), own=own, groups=tuple(bare), traces=traces, num_cut=num_cut
    )


def own_prompts(recipe: Recipe, replica: Replica) -> tuple[int, ...]:
    """Return the indices of the prompts that this rank samples: its part of its replica's.

    A replica gets an equal part of every mini-batch, so that a mini-batch holds the same prompts
    for any number of ranks. Example: 2 mini-batches of 4 prompts, 2 replicas of 2 ranks. Replica 1
    has prompts 2, 3, 6, 7 of the 8; its first rank samples 2 and 6, its second 3 and 7.
    """
    num_updates = recipe.batch.steps_per_generation
    per_update = recipe.prompts_per_step // num_updates
    per_replica = per_update // replica.num_replicas
    first = replica.number * per_replica
    shared = [
        update * per_update + first + index
        for update in range(num_updates)
        for index in range(per_replica)
    ]
    return tuple(shared[replica.own :: replica.size])
