"""The station that scores completions and compares those of each prompt with one another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float64

from moe_replay.engines.types import FinishReason
from moe_replay.grpo.advantage import (
    GroupAdvantages,
    constant_rewards,
    gdpo_advantages,
    group_advantages,
    reward_metrics,
)
from moe_replay.grpo.answers import ask_rewards
from moe_replay.grpo.run import Run
from moe_replay.grpo.types import Rollout, Scored
from moe_replay.recipe.recipe import Recipe


def score_rewards(run: Run, rollout: Rollout) -> Scored:
    """Run the reward functions, and compare the completions of each prompt with one another.

    A completion that the engine aborted is scored, recorded, and compared with nothing: it ended
    where the engine gave up, so its reward says nothing about the policy. One on which no reward
    function has an opinion has no reward.
    """
    generations = run.recipe.rollout.num_generations
    prompts = [rollout.prompts[index] for index in rollout.own for _ in range(generations)]
    texts = [run.decode(completion) for completion in rollout.completions]
    batch = ask_rewards(run, prompts, rollout.completions, texts)
    rewards = {name: scores.reshape(-1, generations) for name, scores in batch.scores.items()}
    totals = batch.total.reshape(-1, generations)
    aborted = np.array([c.finish_reason is FinishReason.ABORTED for c in rollout.completions])
    gathered = run.ranks.gather(
        (rollout.own, totals, aborted.reshape(-1, generations).astype(float), rewards)
    )
    shape = (len(rollout.prompts), generations)
    every_total = _by_prompt(shape, ((own, totals) for own, totals, _, _ in gathered))
    has_reward = ~np.isnan(every_total)
    finished = _by_prompt(shape, ((own, aborted) for own, _, aborted, _ in gathered)) == 0
    scores = {
        name: _by_prompt(shape, ((own, rewards[name]) for own, _, _, rewards in gathered))
        for name in rewards
    }
    compared = _compare(run.recipe, every_total, scores, counts=has_reward & finished)
    for name, score in constant_rewards(scores).items():
        run.journal.warn_once(
            f"constant reward {name}",
            f"reward {name} gave {score:g} to every completion of step {run.step}, and so teaches "
            "nothing in it. If that goes on (rewards/<name>/std), look at completions.jsonl: are its "
            "answers, its tags and its regex those that the model writes?",
        )
    metrics = reward_metrics(compared, scores)
    metrics["completions/unscored_ratio"] = 1.0 - float(has_reward.mean())
    if run.recipe.data.truncation == "left":
        # The share of prompts that lost tokens at their start.
        metrics["prompts/cut_ratio"] = float(np.mean([p.num_cut > 0 for p in rollout.prompts]))
    return Scored(
        texts=tuple(texts),
        rewards=rewards,
        totals=totals,
        advantages=compared.advantages,
        counts=compared.counts,
        metrics=metrics,
    )


def _compare(
    recipe: Recipe,
    totals: Float64[np.ndarray, "prompts generations"],
    scores: Mapping[str, Float64[np.ndarray, "prompts generations"]],
    *,
    counts: Bool[np.ndarray, "prompts generations"],
) -> GroupAdvantages:
    """Return the advantages of a step by ``grpo.advantage_estimator`` and ``grpo.scale_rewards``.

    A group is the row of a prompt in the step, so that equal prompts stay apart.
    """
    scale = recipe.grpo.scale_rewards
    if scale == "gdpo":
        weights = {reward.name: reward.weight for reward in recipe.rewards}
        return gdpo_advantages(scores, weights, counts=counts)
    return group_advantages(
        np.where(np.isnan(totals), 0.0, totals),
        scale_rewards=scale,
        estimator=recipe.grpo.advantage_estimator,
        counts=counts,
    )


def _by_prompt(
    shape: tuple[int, int],
    parts: Iterable[tuple[Sequence[int], Float64[np.ndarray, "own generations"]]],
) -> Float64[np.ndarray, "prompts generations"]:
    """Put the values of every rank's prompts in the rows of these prompts in the step."""
    values = np.full(shape, np.nan)
    for own, part in parts:
        values[list(own)] = part
    return values
