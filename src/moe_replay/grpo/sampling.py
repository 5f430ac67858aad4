"""The stations that sample: rollouts, rewards, advantages, and the evaluation of held-out prompts.

In: an open run. Out: Rollout, Scored, samples. Called by: grpo.loop.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from moe_replay.batch import Sample
from moe_replay.grpo.advantage import GroupAdvantages, group_advantages, reward_metrics
from moe_replay.grpo.metrics import Tally
from moe_replay.grpo.records import EvalRecord
from moe_replay.grpo.run import Run
from moe_replay.rollout.prompts import Prompt
from moe_replay.rollout.types import (
    Completion,
    FinishReason,
    Request,
    RolloutGroup,
    SamplingParams,
    check_group,
)
from moe_replay.routing import ReplayMode

EVAL_REQUESTS = 1 << 40
"""First request id of evaluations, so that they never share sampling noise with training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """This rank's prompts of a step and their completions."""

    prompts: tuple[Prompt, ...]
    """Whole groups, mini-batch after mini-batch."""
    groups: tuple[RolloutGroup, ...]
    """One for each prompt."""

    @property
    def completions(self) -> list[Completion]:
        """All completions, prompt after prompt."""
        return [completion for group in self.groups for completion in group.completions]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Rewards of this rank's completions, and what the whole batch says about them."""

    rewards: Mapping[str, Float64[np.ndarray, "groups generations"]]
    """Reward function -> scores of this rank's completions, before weights."""
    totals: Float64[np.ndarray, "groups generations"]
    """Weighted sums."""
    advantages: Float64[np.ndarray, "groups generations"]
    """Of this rank's completions."""
    metrics: Mapping[str, float]
    """``reward``, ``reward_std``... over all ranks."""


def roll_out(run: Run) -> Rollout:
    """Sample completions for this rank's share of the step's prompts."""
    recipe = run.recipe
    position = run.next_prompt
    prompts = run.inputs.train.at(position, recipe.prompts_per_step)
    run.next_prompt += recipe.prompts_per_step
    mine = run.share_of_prompts()
    requests = [
        Request(
            request_id=position + place,
            prompt_ids=prompts[place].prompt_ids,
            num_generations=recipe.rollout.num_generations,
        )
        for place in mine
    ]
    groups = run.engine.generate(requests, run.sampling())
    for group in groups:
        check_group(group, run.engine.description)
    return Rollout(prompts=tuple(prompts[place] for place in mine), groups=tuple(groups))


def score_rewards(run: Run, rollout: Rollout) -> Scored:
    """Run the reward functions, and compare the completions of each prompt with one another."""
    generations = run.recipe.rollout.num_generations
    batch = run.inputs.rewards.score(
        [prompt for prompt in rollout.prompts for _ in range(generations)],
        [run.decode(completion.token_ids) for completion in rollout.completions],
        [completion.token_ids.tolist() for completion in rollout.completions],
    )
    rewards = {name: scores.reshape(-1, generations) for name, scores in batch.scores.items()}
    totals = batch.total.reshape(-1, generations)
    gathered = run.gather(
        {"totals": totals.tolist(), "rewards": {n: s.tolist() for n, s in rewards.items()}}
    )
    whole = group_advantages(
        np.concatenate([np.array(part["totals"], dtype=np.float64) for part in gathered]),
        scale_rewards=run.recipe.grpo.scale_rewards,
    )
    scores = {
        name: np.concatenate(
            [np.array(part["rewards"][name], dtype=np.float64) for part in gathered]
        )
        for name in rewards
    }
    return Scored(
        rewards=rewards,
        totals=totals,
        advantages=_own_rows(run, whole, len(totals)),
        metrics=reward_metrics(whole, scores),
    )


def make_samples(run: Run, rollout: Rollout, scored: Scored) -> tuple[Sample, ...]:
    """Join prompts, completions and advantages; keep the traces only if the mode replays the engine's."""
    keeps_traces = run.mode is ReplayMode.R3
    samples = []
    for prompt, group, advantages in zip(
        rollout.prompts, rollout.groups, scored.advantages, strict=True
    ):
        for completion, advantage in zip(group.completions, advantages, strict=True):
            overlong = completion.finish_reason is FinishReason.LENGTH
            samples.append(
                Sample(
                    sample_id=len(samples),
                    token_ids=np.concatenate([prompt.prompt_ids, completion.token_ids]),
                    prompt_length=len(prompt.prompt_ids),
                    rollout_logprobs=completion.rollout_logprobs,
                    advantage=float(advantage),
                    trains=not (overlong and run.recipe.grpo.overlong_filter),
                    trace=completion.trace if keeps_traces else None,
                )
            )
    return tuple(samples)


def evaluate(run: Run) -> None:
    """Report the reward of held-out prompts under the current weights."""
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
            seed=run.recipe.run.seed,
        )
        groups = run.engine.generate(requests, sampling)
        completions = [completion for group in groups for completion in group.completions]
        batch = run.inputs.rewards.score(
            [prompts[place] for place in mine for _ in range(settings.num_generations)],
            [run.decode(completion.token_ids) for completion in completions],
            [completion.token_ids.tolist() for completion in completions],
        )
        tally = Tally()
        tally.add_mean("eval/reward", total=float(batch.total.sum()), count=len(batch.total))
        for name, scores in batch.scores.items():
            tally.add_mean(f"eval/rewards/{name}", total=float(scores.sum()), count=len(scores))
        tally.add_sum("eval/num_items", len(mine))
        metrics = run.merge(tally)
    run.reporter.evaluation(
        EvalRecord(step=run.step, metrics=metrics, seconds=time.perf_counter() - started)
    )


def _own_rows(
    run: Run, whole: GroupAdvantages, num_groups: int
) -> Float64[np.ndarray, "groups generations"]:
    first = run.process.rank * num_groups
    return whole.advantages[first : first + num_groups]
