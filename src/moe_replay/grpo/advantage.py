"""Advantages: how much better a completion did than the other completions of its prompt.

In: rewards of whole groups. Out: GroupAdvantages and the reward metrics. Called by: grpo.loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float64

from moe_replay.errors import RecipeError, RewardError

ScaleRewards = Literal["group", "batch", "none"]

STD_EPSILON = 1e-4
"""Added to the standard deviation before dividing by it; the value that TRL and Megatron-SWIFT use."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupAdvantages:
    """Advantages of a rollout batch, and the spread of the rewards that they came from."""

    advantages: Float64[np.ndarray, "groups generations"]
    """Reward minus group mean, divided as ``scale_rewards`` says; exactly 0 in a group of equal rewards."""
    reward_mean: float
    """Mean reward of all completions."""
    reward_std: float
    """Mean over groups of the standard deviation in a group; with ``batch``, that of all completions."""
    equal_rewards: Bool[np.ndarray, " groups"]
    """True for a group whose rewards are all equal: its completions teach nothing."""

    @property
    def frac_reward_zero_std(self) -> float:
        """Fraction of groups whose rewards are all equal."""
        return float(self.equal_rewards.mean())


def group_advantages(
    rewards: Float64[np.ndarray, "groups generations"], *, scale_rewards: ScaleRewards
) -> GroupAdvantages:
    """Compare each reward with the mean of its group.

    ``group`` divides by the group's standard deviation, ``batch`` by that of all rewards, ``none`` by nothing.
    Standard deviations have n - 1 in the denominator. Rewards ``[[1, 0]]`` give ``+-0.5 / (0.70711 + 1e-4)`` with
    ``group`` and ``[[0.5, -0.5]]`` with ``none``.

    Source: GRPO, arXiv 2402.03300, section 4.1.2 (``group``); Dr. GRPO, arXiv 2503.20783 (``none``); TRL,
    ``GRPOTrainer`` (``batch``, and n - 1).

    Raises:
        RecipeError: for groups of one, which have no advantage.
        RewardError: when a reward is not finite.
    """
    num_groups, num_generations = rewards.shape
    if num_groups < 1 or num_generations < 2:
        raise RecipeError(
            f"{num_groups} groups of {num_generations} completions, expected at least 1 group of at least 2: a lone "
            "completion has nothing to be compared with; raise rollout.num_generations"
        )
    _check_finite("rewards", rewards)
    equal = rewards.max(axis=1) == rewards.min(axis=1)
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    # The mean of n equal numbers may differ from them in the last bit, which the division would blow up.
    centred[equal] = 0.0
    group_std = np.sqrt((centred**2).sum(axis=1) / (num_generations - 1))
    batch_std = _std(rewards)
    divisor = {
        "group": group_std[:, None] + STD_EPSILON,
        "batch": batch_std + STD_EPSILON,
        "none": 1.0,
    }
    return GroupAdvantages(
        advantages=centred / divisor[scale_rewards],
        reward_mean=float(rewards.mean()),
        reward_std=batch_std if scale_rewards == "batch" else float(group_std.mean()),
        equal_rewards=equal,
    )


def reward_metrics(
    result: GroupAdvantages, rewards: Mapping[str, Float64[np.ndarray, "groups generations"]]
) -> dict[str, float]:
    """Return ``reward``, ``reward_std``, ``frac_reward_zero_std`` and ``rewards/<function>/{mean,std}``.

    ``rewards`` holds each reward function's scores before weights; their standard deviation is over all completions.

    Raises:
        RewardError: when a score is not finite.
    """
    metrics = {
        "reward": result.reward_mean,
        "reward_std": result.reward_std,
        "frac_reward_zero_std": result.frac_reward_zero_std,
    }
    for name, scores in rewards.items():
        _check_finite(name, scores)
        metrics[f"rewards/{name}/mean"] = float(scores.mean())
        metrics[f"rewards/{name}/std"] = _std(scores)
    return metrics


def _std(scores: np.ndarray) -> float:
    return 0.0 if scores.max() == scores.min() else float(scores.std(ddof=1))


def _check_finite(name: str, scores: np.ndarray) -> None:
    bad = np.argwhere(~np.isfinite(scores))
    if len(bad):
        group, generation = bad[0]
        raise RewardError(
            f"{name}: {len(bad)} of {scores.size} scores are not finite, the first is {scores[group, generation]} at "
            f"group {group}, completion {generation}; a reward function must return one finite number a completion"
        )
