"""The station that scores completions and compares those of each prompt with one another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float64

from moe_replay.engines.types import FinishReason
from moe_replay.grpo.advantage import constant_rewards, reward_metrics
from moe_replay.grpo.answers import ask_rewards
from moe_replay.grpo.metrics import Tally, function_tally
from moe_replay.grpo.rounds import Rounds, compared
from moe_replay.grpo.run import Run
from moe_replay.grpo.types import Rated, Rollout, Scored
from moe_replay.recipe.recipe import Recipe
from moe_replay.recipe.sections.mixture import CurriculumSection
from moe_replay.tasks.encoding import Prompt


def rate_completions(run: Run, rollout: Rollout) -> Rated:
    """Run the reward functions on this rank's completions, and gather what they say on all ranks.

    A completion that the engine aborted is scored, recorded, and compared with nothing: it ended
    where the engine gave up, so its reward says nothing about the policy. One on which no reward
    function has an opinion has no reward.
    """
    generations = run.recipe.rollout.num_generations
    prompts = [rollout.prompts[index] for index in rollout.own for _ in range(generations)]
    texts = [run.decode(completion) for completion in rollout.completions]
    batch = ask_rewards(run, prompts, rollout.completions, texts, rollout.conversations)
    rewards = {name: scores.reshape(-1, generations) for name, scores in batch.scores.items()}
    totals = batch.total.reshape(-1, generations)
    aborted = np.array([c.finish_reason is FinishReason.ABORTED for c in rollout.completions])
    gathered = run.ranks.gather(
        (rollout.own, totals, aborted.reshape(-1, generations).astype(float), rewards)
    )
    tally = Tally.merge(run.ranks.gather(function_tally(batch)))
    shape = (len(rollout.prompts), generations)
    every_total = _by_prompt(shape, ((own, totals) for own, totals, _, _ in gathered))
    finished = _by_prompt(shape, ((own, aborted) for own, _, aborted, _ in gathered)) == 0
    return Rated(
        rollout=rollout,
        texts=tuple(texts),
        rewards=rewards,
        totals=totals,
        every_reward={
            name: _by_prompt(shape, ((own, rewards[name]) for own, _, _, rewards in gathered))
            for name in rewards
        },
        every_total=every_total,
        counts=~np.isnan(every_total) & finished,
        tally=tally,
    )


def score_groups(run: Run, rounds: Rounds) -> tuple[Rollout, Scored]:
    """Compare the completions of each prompt that the step learns from with one another.

    Metrics of rewards are of all that was sampled, so that choosing does not flatter the policy.
    """
    sampled = rounds.sampled
    for name, score in constant_rewards(sampled.every_reward).items():
        run.journal.warn_once(
            f"constant reward {name}",
            f"reward {name} gave {score:g} to every completion of step {run.step}, and so teaches "
            "nothing in it. If that goes on (rewards/<name>/std), look at completions.jsonl: are its "
            "answers, its tags and its regex those that the model writes?",
        )
    metrics = reward_metrics(compared(run.recipe, sampled), sampled.every_reward)
    metrics |= sampled.tally.finish()
    metrics["completions/unscored_ratio"] = float(np.isnan(sampled.every_total).mean())
    if run.recipe.data.truncation == "left":
        # The share of prompts that lost tokens at their start.
        cut = [prompt.num_cut > 0 for prompt in sampled.rollout.prompts]
        metrics["prompts/cut_ratio"] = float(np.mean(cut))
    metrics |= _by_dataset(run.recipe, sampled)
    if (curriculum := run.recipe.curriculum) is not None:
        metrics |= _of_curriculum(curriculum, run.step, sampled.rollout.prompts)
    learned = rounds.learned
    of_groups = compared(run.recipe, learned)
    scored = Scored(
        texts=learned.texts,
        rewards=learned.rewards,
        totals=learned.totals,
        advantages=of_groups.advantages,
        counts=of_groups.counts,
        metrics=metrics | rounds.metrics(),
    )
    return learned.rollout, scored


def _by_dataset(recipe: Recipe, sampled: Rated) -> dict[str, float]:
    """Return ``datasets/*``: how many prompts came from each dataset of a mixture, and rewards."""
    metrics = {}
    for entry in recipe.mixture:
        own = [prompt.dataset == entry.name for prompt in sampled.rollout.prompts]
        metrics[f"datasets/{entry.name}/num_prompts"] = float(sum(own))
        given = sampled.every_total[own]
        given = given[~np.isnan(given)]
        if len(given):
            metrics[f"datasets/{entry.name}/reward"] = float(given.mean())
    return metrics


def _of_curriculum(
    section: CurriculumSection, step: int, prompts: Sequence[Prompt]
) -> dict[str, float]:
    """Return how far a curriculum is: its band, and the mean number of what was drawn."""
    numbers = [prompt.difficulty for prompt in prompts if prompt.difficulty is not None]
    metrics = {"curriculum/mean": float(np.mean(numbers))} if numbers else {}
    if section.bands:
        metrics["curriculum/band"] = float(section.band_of(step))
    return metrics


def _by_prompt(
    shape: tuple[int, int],
    parts: Iterable[tuple[Sequence[int], Float64[np.ndarray, "own generations"]]],
) -> Float64[np.ndarray, "prompts generations"]:
    """Put the values of every rank's prompts in the rows of these prompts in the step."""
    values = np.full(shape, np.nan)
    for own, part in parts:
        values[list(own)] = part
    return values
