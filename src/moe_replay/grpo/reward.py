"""The station that scores completions and compares those of each prompt with one another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float64

from moe_replay.engines.types import FinishReason
from moe_replay.grpo.advantage import constant_rewards, group_advantages, reward_metrics
from moe_replay.grpo.answers import ask_rewards
from moe_replay.grpo.run import Run
from moe_replay.grpo.types import Rollout, Scored


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
    compared = group_advantages(
        np.where(has_reward, every_total, 0.0),
        scale_rewards=run.recipe.grpo.scale_rewards,
        estimator=run.recipe.grpo.advantage_estimator,
        counts=has_reward & finished,
    )
    scores = {
        name: _by_prompt(shape, ((own, rewards[name]) for own, _, _, rewards in gathered))
        for name in rewards
    }
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


def _by_prompt(
    shape: tuple[int, int],
    parts: Iterable[tuple[Sequence[int], Float64[np.ndarray, "own generations"]]],
) -> Float64[np.ndarray, "prompts generations"]:
    """Put the values of every rank's prompts in the rows of these prompts in the step."""
    values = np.full(shape, np.nan)
    for own, part in parts:
        values[list(own)] = part
    return values
