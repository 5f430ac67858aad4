"""The stations that sample: rollouts, rewards, advantages, and the evaluation of held-out prompts.

In: an open run. Out: Rollout, Scored.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float64

from moe_replay.engines.types import (
    Completion,
    FinishReason,
    Request,
    RolloutGroup,
    SamplingParams,
    check_groups,
)
from moe_replay.grpo.advantage import constant_rewards, group_advantages, reward_metrics
from moe_replay.grpo.engines import training_request
from moe_replay.grpo.kept import kept_completions
from moe_replay.grpo.metrics import Tally
from moe_replay.grpo.records import EvalRecord
from moe_replay.grpo.run import Run
from moe_replay.grpo.stopping import StepDropped
from moe_replay.routing import Routing, RoutingTrace
from moe_replay.tasks.prompts import Prompt
from moe_replay.tasks.rewards.rewards import ScoredBatch

EVAL_REQUESTS = 1 << 40
"""First request id of evaluations, so that they never share sampling noise with training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A step's prompts, and the completions that this rank sampled."""

    prompts: tuple[Prompt, ...]
    """All prompts of the step, mini-batch after mini-batch."""
    places: tuple[int, ...]
    """Which of them this rank sampled."""
    groups: tuple[RolloutGroup, ...]
    """One for each of ``places``, without traces."""
    traces: dict[tuple[int, int], RoutingTrace]
    """(place, number of the completion) -> its trace; emptied as soon as the routes have been cut."""
    num_cut: int
    """Tokens that the engine sampled on this rank behind a stop string, and that were cut off."""

    @property
    def completions(self) -> list[Completion]:
        """All completions of this rank, prompt after prompt."""
        return [completion for group in self.groups for completion in group.completions]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Rewards of this rank's completions, and what the whole batch says about them."""

    texts: tuple[str, ...]
    """What this rank's completions say, prompt after prompt."""
    rewards: Mapping[str, Float64[np.ndarray, "own generations"]]
    """Reward function -> scores of this rank's completions, before weights; NaN where it has no opinion."""
    totals: Float64[np.ndarray, "own generations"]
    """Weighted sums; NaN where no function has an opinion."""
    advantages: Float64[np.ndarray, "prompts generations"]
    """Of all completions of the step."""
    counts: Bool[np.ndarray, "prompts generations"]
    """False for a completion that was compared with nothing, and so must not train."""
    metrics: Mapping[str, float]
    """``reward``, ``reward_std``... over all ranks."""


def roll_out(run: Run) -> Rollout:
    """Sample completions for this rank's part of the step's prompts."""
    recipe = run.recipe
    position = run.next_prompt
    prompts = run.inputs.train.at(position, recipe.prompts_per_step)
    run.next_prompt += recipe.prompts_per_step
    places = run.own_prompts()
    requests = [training_request(recipe, position + place, prompts[place]) for place in places]
    groups, num_cut = _answers(run, requests, run.sampling())
    traces: dict[tuple[int, int], RoutingTrace] = {}
    bare = []
    for place, group in zip(places, groups, strict=True):
        for number, completion in enumerate(group.completions):
            if completion.trace is not None and run.mode.passes.engine is Routing.RECORD:
                traces[place, number] = completion.trace
        bare.append(
            replace(group, completions=tuple(replace(c, trace=None) for c in group.completions))
        )
    return Rollout(
        prompts=tuple(prompts),
        places=tuple(places),
        groups=tuple(bare),
        traces=traces,
        num_cut=num_cut,
    )


def _answers(
    run: Run, requests: Sequence[Request], sampling: SamplingParams
) -> tuple[list[RolloutGroup], int]:
    """Return what the engine answers, held to the contract of all engines and ended at stop strings; and tokens cut off.

    Raises:
        StepDropped: on every rank, when one of them was asked to stop.
        EngineError: on every rank, when the engine of one fails or breaks the contract; of ranks that share an engine which
            fails while it samples, only on that one, for the others wait inside.
    """
    rollout = run.recipe.rollout
    # The ranks of one vLLM take their steps together, so none of them may leave alone.
    groups = run.droppable(
        lambda: run.engine.generate(requests, sampling), alone=rollout.tensor_parallel_size == 1
    )
    stale = rollout.engine == "files" and rollout.allow_stale

    def checked() -> list[tuple[RolloutGroup, int]]:
        check_groups(
            groups,
            requests,
            sampling,
            run.engine.description,
            vocab_size=run.actor.vocab_size,
            policy_version=None if stale else run.policy_version,
        )
        return [run.stop_strings.cut(group) for group in groups]

    cut = run.droppable(checked)
    return [group for group, _ in cut], sum(count for _, count in cut)


def score_rewards(run: Run, rollout: Rollout) -> Scored:
    """Run the reward functions, and compare the completions of each prompt with one another.

    A completion that the engine aborted is scored and recorded, and compared with nothing: it ended where the engine
    gave up, so its reward says nothing about the policy. One on which no reward function has an opinion has no reward.
    """
    generations = run.recipe.rollout.num_generations
    prompts = [rollout.prompts[place] for place in rollout.places for _ in range(generations)]
    texts = [run.decode(completion) for completion in rollout.completions]
    batch = _score(run, prompts, rollout.completions, texts)
    rewards = {name: scores.reshape(-1, generations) for name, scores in batch.scores.items()}
    totals = batch.total.reshape(-1, generations)
    aborted = [c.finish_reason is FinishReason.ABORTED for c in rollout.completions]
    gathered = run.gather(
        {
            "places": rollout.places,
            "totals": totals.tolist(),
            "aborted": np.array(aborted, dtype=bool).reshape(-1, generations).tolist(),
            "rewards": {name: scores.tolist() for name, scores in rewards.items()},
        }
    )
    shape = (len(rollout.prompts), generations)
    everyone = _by_place(shape, ((part["places"], part["totals"]) for part in gathered))
    has_reward = ~np.isnan(everyone)
    finished = _by_place(shape, ((part["places"], part["aborted"]) for part in gathered)) == 0
    whole = group_advantages(
        np.where(has_reward, everyone, 0.0),
        scale_rewards=run.recipe.grpo.scale_rewards,
        estimator=run.recipe.grpo.advantage_estimator,
        counts=has_reward & finished,
    )
    scores = {
        name: _by_place(shape, ((part["places"], part["rewards"][name]) for part in gathered))
        for name in rewards
    }
    for name, score in constant_rewards(scores).items():
        run.warn_once(
            f"constant reward {name}",
            f"reward {name} gave {score:g} to every completion of step {run.step}, and so teaches nothing in it. If that "
            "goes on (rewards/<name>/std), look at completions.jsonl: are its answers, its tags and its regex those that "
            "the model writes?",
        )
    return Scored(
        texts=tuple(texts),
        rewards=rewards,
        totals=totals,
        advantages=whole.advantages,
        counts=whole.counts,
        metrics=reward_metrics(whole, scores)
        | {"completions/unscored_ratio": 1.0 - float(has_reward.mean())}
        | _cut_prompts(run, rollout),
    )


def _cut_prompts(run: Run, rollout: Rollout) -> dict[str, float]:
    """Return the share of prompts that lost tokens at their start; nothing where the recipe cuts none."""
    if run.recipe.data.truncation != "left":
        return {}
    return {"prompts/cut_ratio": float(np.mean([prompt.num_cut > 0 for prompt in rollout.prompts]))}


def _score(
    run: Run,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    texts: Sequence[str],
) -> ScoredBatch:
    """Call the reward functions on completions of this rank; one without a token has no reward, and none sees it.

    Raises:
        RewardError: on every rank, when one fails on any of them.
        StepDropped: on every rank, when one of them was asked to stop.
    """
    written = [number for number, c in enumerate(completions) if len(c.token_ids)]
    batch = run.droppable(
        lambda: run.inputs.rewards.score(
            [prompts[number] for number in written],
            # An answer that the prompt begins is one text to a reward.
            [prompts[number].prefill + texts[number] for number in written],
            [completions[number].token_ids for number in written],
        )
    )

    def everyone(scores: Float64[np.ndarray, " written"]) -> Float64[np.ndarray, " n"]:
        whole = np.full(len(completions), np.nan)
        whole[written] = scores
        return whole

    return ScoredBatch(
        scores={name: everyone(scores) for name, scores in batch.scores.items()},
        total=everyone(batch.total),
    )


def evaluate(run: Run) -> None:
    """Report the reward of held-out prompts under the current weights; owed when the run is asked to stop meanwhile."""
    run.evaluation_is_owed = run.inputs.held_out is not None
    if run.inputs.held_out is None:
        return
    started = time.perf_counter()
    settings = run.recipe.eval
    held_out = run.inputs.held_out
    count = min(run.recipe.data.eval_size, held_out.num_prompts or run.recipe.data.eval_size)
    with run.station("eval"):
        prompts = held_out.at(0, count)
        mine = range(run.process.rank, count, run.process.world_size)
        requests = [
            Request(
                request_id=EVAL_REQUESTS + place,
                prompt_ids=prompts[place].prompt_ids,
                num_generations=settings.num_generations,
            )
            for place in mine
        ]
        sampling = SamplingParams(
            max_completion_length=run.recipe.rollout.max_completion_length,
            temperature=settings.temperature,
            stop_token_ids=run.recipe.rollout.stop_token_ids,
            seed=run.recipe.run.seed,
        )
        try:
            groups, _ = _answers(run, requests, sampling)
            completions = [completion for group in groups for completion in group.completions]
            asked = [prompts[place] for place in mine for _ in range(settings.num_generations)]
            texts = [run.decode(completion) for completion in completions]
            batch = _score(run, asked, completions, texts)
        except StepDropped:
            return
        tally = _eval_tally(batch)
        tally.add_sum("eval/num_items", len(mine))
        metrics = run.merge(tally)
        kept = kept_completions(
            run,
            prompts,
            list(mine),
            groups,
            texts=texts,
            rewards=batch.scores,
            totals=batch.total,
        )
    record = EvalRecord(step=run.step, metrics=metrics, seconds=time.perf_counter() - started)
    run.reporter.evaluation(record, kept)
    run.evaluation_is_owed = False


def _eval_tally(batch: ScoredBatch) -> Tally:
    """Tally what this rank's held-out completions earned."""
    tally = Tally()
    _add_opinions(tally, "eval/reward", batch.total)
    for name, scores in batch.scores.items():
        _add_opinions(tally, f"eval/rewards/{name}", scores)
    unscored = int(np.isnan(batch.total).sum())
    tally.add_mean("eval/unscored_ratio", total=unscored, count=len(batch.total))
    return tally


def _add_opinions(tally: Tally, name: str, scores: Float64[np.ndarray, " n"]) -> None:
    """Add the mean of the scores that are there."""
    given = scores[~np.isnan(scores)]
    tally.add_mean(name, total=float(given.sum()), count=len(given))


def _by_place(
    shape: tuple[int, int], parts: Iterable[tuple[Sequence[int], Sequence[Sequence[float]]]]
) -> Float64[np.ndarray, "prompts generations"]:
    """Put the values of every rank's prompts into their places among all prompts of the step."""
    whole = np.full(shape, np.nan)
    for places, values in parts:
        # The second dim by name: of a rank that sampled nothing it cannot be inferred.
        whole[list(places)] = np.array(values, dtype=np.float64).reshape(len(places), shape[1])
    return whole
