"""Advantages: how much better a completion did than the other completions of its prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float64

from moe_replay.errors import RewardError
from moe_replay.grpo import estimators

ScaleRewards = Literal["group", "batch", "none"]

STD_EPSILON = 1e-4
"""Added to a standard deviation before dividing by it; as in TRL and Megatron-SWIFT."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupAdvantages:
    """Advantages of a rollout batch, and the spread of the rewards that they came from."""

    advantages: Float64[np.ndarray, "groups generations"]
    """Reward minus what it is compared with, divided as ``scale_rewards`` says; exactly 0 in a
    group of equal rewards, and for a completion that does not count."""
    reward_mean: float | None
    """Mean reward of all completions that count; None when none does."""
    reward_std: float | None
    """Mean over groups of their standard deviation; with ``batch``, that of all rewards."""
    equal_rewards: Bool[np.ndarray, " groups"]
    """True for a group whose rewards are all equal: its completions teach nothing."""
    counts: Bool[np.ndarray, "groups generations"]
    """False for a completion without a reward, or whose reward means nothing (it was aborted)."""


def group_advantages(
    rewards: Float64[np.ndarray, "groups generations"],
    *,
    scale_rewards: ScaleRewards,
    estimator: str = "grpo",
    counts: Bool[np.ndarray, "groups generations"] | None = None,
) -> GroupAdvantages:
    """Compare each reward with the others of its group.

    ``estimator`` names a function of `estimators`. ``group`` divides by the group's standard
    deviation, ``batch`` by that of all rewards, ``none`` by nothing; standard deviations have n - 1
    in the denominator. Rewards ``[[1, 0]]`` give ``+-0.5 / (0.70711 + 1e-4)`` with ``group`` and
    ``[[0.5, -0.5]]`` with ``none``. Completions without ``counts`` (default: all have it) are part
    of no mean and no standard deviation, and their advantage is 0.

    Source: GRPO, arXiv 2402.03300, section 4.1.2 (``group``); Dr. GRPO, arXiv 2503.20783
    (``none``); TRL, ``GRPOTrainer`` (``batch``, and n - 1).

    Raises:
        RewardError: when a reward is so large that its advantage is not finite.
    """
    # The recipe asks for two completions a prompt, and the reward process returns finite scores.
    assert rewards.shape[1] > 1 and np.isfinite(rewards).all()
    compare: Callable[..., np.ndarray] = getattr(estimators, estimator)
    counts = np.ones(rewards.shape, dtype=bool) if counts is None else counts
    num_counted = counts.sum(axis=1, keepdims=True)
    counted = rewards[counts]
    highest = np.where(counts, rewards, -np.inf).max(axis=1)
    equal = highest <= np.where(counts, rewards, np.inf).min(axis=1)
    # Overflow is found below, where it can be explained.
    with np.errstate(over="ignore", invalid="ignore"):
        means = (rewards * counts).sum(axis=1, keepdims=True) / np.maximum(num_counted, 1)
        centred = np.where(counts, rewards - means, 0.0)
        # A mean of equal numbers may differ in the last bit, which the division would amplify.
        centred[equal] = 0.0
        group_std = np.sqrt((centred**2).sum(axis=1) / np.maximum(num_counted[:, 0] - 1, 1))
        batch_std = _std(counted) if len(counted) else 0.0
        divisor = {
            "group": group_std[:, None] + STD_EPSILON,
            "batch": batch_std + STD_EPSILON,
            "none": 1.0,
        }
        advantages = compare(centred, num_counted) / divisor[scale_rewards]
        reward_mean = float(counted.mean()) if len(counted) else None
    _check_size(rewards, advantages, group_std, batch_std, reward_mean or 0.0)
    reward_std = batch_std if scale_rewards == "batch" else float(group_std.mean())
    return GroupAdvantages(
        advantages=advantages,
        reward_mean=reward_mean,
        reward_std=reward_std if len(counted) else None,
        equal_rewards=equal,
        counts=counts,
    )


def reward_metrics(
    result: GroupAdvantages, rewards: Mapping[str, Float64[np.ndarray, "groups generations"]]
) -> dict[str, float]:
    """Return ``reward*``, ``frac_reward_zero_std``, ``rewards/<function>/{mean,std,none_ratio}``.

    ``rewards`` holds each reward function's scores before weights, NaN where it has no opinion;
    ``none_ratio`` is the fraction of those. Mean and standard deviation are over the others that
    count, and omitted where none does.
    """
    metrics = {"frac_reward_zero_std": float(result.equal_rewards.mean())}
    if result.reward_mean is not None and result.reward_std is not None:
        metrics |= {"reward": result.reward_mean, "reward_std": result.reward_std}
    for name, scores in rewards.items():
        has_opinion = ~np.isnan(scores)
        metrics[f"rewards/{name}/none_ratio"] = 1.0 - float(has_opinion.mean())
        counted = scores[result.counts & has_opinion]
        if len(counted):
            metrics[f"rewards/{name}/mean"] = float(counted.mean())
            metrics[f"rewards/{name}/std"] = _std(counted)
    return metrics


def constant_rewards(
    rewards: Mapping[str, Float64[np.ndarray, "groups generations"]],
) -> dict[str, float]:
    """Return each reward function that gave all its completions the same score, with that score."""
    given = {name: scores[~np.isnan(scores)] for name, scores in rewards.items()}
    return {
        name: float(scores[0])
        for name, scores in given.items()
        if len(scores) > 1 and scores.max() == scores.min()
    }


def _std(scores: np.ndarray) -> float:
    return 0.0 if scores.max() == scores.min() else float(scores.std(ddof=1))


def _check_size(
    rewards: np.ndarray, advantages: np.ndarray, *statistics: np.ndarray | float
) -> None:
    """Raise `RewardError` when rewards are too far apart for advantages in float32."""
    fits = np.abs(advantages).max() <= np.finfo(np.float32).max
    if not fits or not all(np.isfinite(value).all() for value in statistics):
        group, generation = np.unravel_index(np.abs(rewards).argmax(), rewards.shape)
        raise RewardError(
            f"rewards reach {rewards[group, generation]:g} (group {group}, completion {generation}), "
            "expected numbers whose squares and differences are finite: their advantages overflow; "
            "scale the reward function or its weight down"
        )
