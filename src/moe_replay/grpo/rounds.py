"""The rounds in which a step is sampled: one, or with ``grpo.dynamic_sample`` up to a bound.

In: what was sampled in each round, with its rewards. Out: the prompts that the step learns from.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TypeVar

import numpy as np

from moe_replay.grpo.advantage import GroupAdvantages, gdpo_advantages, group_advantages
from moe_replay.grpo.metrics import Tally
from moe_replay.grpo.types import Rated, Rollout
from moe_replay.recipe.recipe import Recipe

T = TypeVar("T")


class Rounds:
    """What a step has sampled so far, and how many prompts it lacks; the same on every rank.

    With ``grpo.dynamic_sample`` a prompt whose completions all have the same reward teaches
    nothing, and another is sampled for it. After ``grpo.max_resample_times`` further rounds the
    step takes what it has: all that teach, and of the others the first ones that fill it up.

    Example: a step of 4 prompts. Of the first 4, number 1 and 3 have equal rewards; 2 more are
    sampled, of which number 4 has too. One more, number 6, completes the step: it learns from 0, 2,
    5 and 6. If number 6 has equal rewards too and the bound is reached, from 0, 1, 2 and 5.

    Source: DAPO, arXiv 2503.14476, section 3.2; the names are Megatron-SWIFT's, which at the bound
    takes its first batch instead.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._rounds: list[Rated] = []
        self._teaches: list[bool] = []

    def add(self, rated: Rated) -> None:
        """Take what a round has sampled."""
        self._rounds.append(rated)
        self._teaches += (~compared(self._recipe, rated).equal_rewards).tolist()

    @property
    def num_wanted(self) -> int:
        """Prompts to be sampled in the next round; 0 when the step is complete."""
        size = self._recipe.prompts_per_step
        grpo = self._recipe.grpo
        if not self._rounds:
            return size
        if not grpo.dynamic_sample or len(self._rounds) > grpo.max_resample_times:
            return 0
        return max(0, size - sum(self._teaches))

    @property
    def sampled(self) -> Rated:
        """All rounds, one after the other."""
        return self._rounds[0] if len(self._rounds) == 1 else _joined(self._rounds)

    @cached_property
    def learned(self) -> Rated:
        """The prompts that the step learns from, in the order in which they were sampled.

        Their traces are handed over with them, and those of other prompts are forgotten.
        """
        size = self._recipe.prompts_per_step
        if len(self._teaches) == size:
            return self.sampled
        numbers = range(len(self._teaches))
        best_first = sorted(numbers, key=lambda number: not self._teaches[number])
        learned = _only(self.sampled, sorted(best_first[:size]))
        for rated in self._rounds:
            rated.rollout.traces.clear()
        return learned

    def metrics(self) -> dict[str, float]:
        """Return ``dynamic_sampling/*``; nothing without it."""
        if not self._recipe.grpo.dynamic_sample:
            return {}
        size = self._recipe.prompts_per_step
        num_teach = sum(self._teaches)
        return {
            "dynamic_sampling/rounds": float(len(self._rounds)),
            "dynamic_sampling/sampled_groups": float(len(self._teaches)),
            "dynamic_sampling/dropped_groups": float(len(self._teaches) - size),
            "dynamic_sampling/missing_groups": float(max(0, size - num_teach)),
        }


def compared(recipe: Recipe, rated: Rated) -> GroupAdvantages:
    """Compare each completion with the others of its prompt, as ``[grpo]`` says.

    A group is the row of a prompt, so that equal prompts stay apart.
    """
    scale = recipe.grpo.scale_rewards
    if scale == "gdpo":
        weights = {reward.name: reward.weight for reward in recipe.rewards}
        if recipe.environment is not None and recipe.environment.name in rated.every_reward:
            weights[recipe.environment.name] = recipe.environment.weight
        return gdpo_advantages(rated.every_reward, weights, counts=rated.counts)
    totals = rated.every_total
    return group_advantages(
        np.where(np.isnan(totals), 0.0, totals),
        scale_rewards=scale,
        estimator=recipe.grpo.advantage_estimator,
        counts=rated.counts,
    )


def _joined(rounds: Sequence[Rated]) -> Rated:
    """Return the rounds as one, prompt after prompt."""
    rollouts = [rated.rollout for rated in rounds]
    firsts = list(itertools.accumulate((len(r.prompts) for r in rollouts), initial=0))
    every = list(zip(firsts, rollouts, strict=False))
    rollout = Rollout(
        prompts=tuple(prompt for r in rollouts for prompt in r.prompts),
        own=tuple(first + index for first, r in every for index in r.own),
        groups=tuple(group for r in rollouts for group in r.groups),
        traces={
            (first + index, number): trace
            for first, r in every
            for (index, number), trace in r.traces.items()
        },
        num_cut=sum(r.num_cut for r in rollouts),
        policy_version=rollouts[0].policy_version,
        conversations=tuple(talk for r in rollouts for talk in r.conversations),
    )
    names = rounds[0].rewards
    return Rated(
        rollout=rollout,
        texts=tuple(text for rated in rounds for text in rated.texts),
        rewards={name: np.concatenate([r.rewards[name] for r in rounds]) for name in names},
        totals=np.concatenate([rated.totals for rated in rounds]),
        every_reward={
            name: np.concatenate([r.every_reward[name] for r in rounds]) for name in names
        },
        every_total=np.concatenate([rated.every_total for rated in rounds]),
        counts=np.concatenate([rated.counts for rated in rounds]),
        tally=Tally.merge(rated.tally for rated in rounds),
    )


def _only(rated: Rated, kept: Sequence[int]) -> Rated:
    """Return the prompts ``kept``, by index in increasing order."""
    rollout = rated.rollout
    new = {index: number for number, index in enumerate(kept)}
    rows = [row for row, index in enumerate(rollout.own) if index in new]
    generations = rated.totals.shape[1]
    groups = tuple(rollout.groups[row] for row in rows)

    def chosen(values: Sequence[T]) -> Iterator[T]:
        for row in rows:
            yield from values[row * generations : (row + 1) * generations]

    return Rated(
        rollout=replace(
            rollout,
            prompts=tuple(rollout.prompts[index] for index in kept),
            own=tuple(new[rollout.own[row]] for row in rows),
            groups=groups,
            traces={
                (new[index], number): trace
                for (index, number), trace in rollout.traces.items()
                if index in new
            },
            conversations=tuple(chosen(rollout.conversations)),
        ),
        texts=tuple(chosen(rated.texts)),
        rewards={name: scores[rows] for name, scores in rated.rewards.items()},
        totals=rated.totals[rows],
        every_reward={name: scores[kept] for name, scores in rated.every_reward.items()},
        every_total=rated.every_total[kept],
        counts=rated.counts[kept],
        tally=rated.tally,
    )
