"""Advantages: how much better a completion did than the other completions of its prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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
    deviation, ``batch`` by that of all rewards (with ``reinforce_plus_plus``: of all rewards minus
    the means of their groups), ``none`` by nothing; standard deviations have n - 1 in the
    denominator. Rewards ``[[1, 0]]`` give ``+-0.5 / (0.70711 + 1e-4)`` with ``group`` and
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
    counted = rewards[counts]
    equal = equal_rewards(rewards, counts)
    # Overflow is found below, where it can be explained.
    with np.errstate(over="ignore", invalid="ignore"):
        centred = _centred(rewards, counts, equal)
        group_std = _group_std(centred, counts)
        compared = compare(centred, counts.sum(axis=1, keepdims=True))
        is_own = estimator in estimators.SCALED_BY_ITS_OWN_SPREAD
        batch_std = _std(counted)
        divisor = {
            "group": group_std[:, None] + STD_EPSILON,
            "batch": (_std(compared[counts]) if is_own else batch_std) + STD_EPSILON,
            "none": 1.0,
        }
        advantages = compared / divisor[scale_rewards]
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


def gdpo_advantages(
    scores: Mapping[str, Float64[np.ndarray, "groups generations"]],
    weights: Mapping[str, float],
    *,
    counts: Bool[np.ndarray, "groups generations"],
) -> GroupAdvantages:
    """Normalize each reward function in its group, and the weighted sum of that over the batch.

    ``scores`` holds scores before weights, NaN where a function has no opinion: it then adds
    nothing to that completion, and is normalized over the others. In a group whose functions each
    give all completions the same score, advantages are exactly 0. Example: the scores (1, 0) and
    (0, 2) of one group, with weights 1 and 0.5, have equal weighted sums, from which GRPO learns
    nothing; normalized they are +-0.707 and -+0.707, and sum up to +-0.354.

    Source: GDPO, arXiv 2601.05242; Megatron-SWIFT, ``scale_rewards: gdpo``, and TRL,
    ``multi_objective_aggregation: normalize_then_sum``, whose constant beside the standard
    deviations is ours (the former has 1e-8).

    Raises:
        RewardError: when a score is so large that an advantage is not finite.
    """
    summed, totals = np.zeros(counts.shape), np.zeros(counts.shape)
    equal = np.ones(len(counts), dtype=bool)
    for name, given in scores.items():
        has_opinion = counts & ~np.isnan(given)
        values = np.where(has_opinion, given, 0.0)
        same = equal_rewards(values, has_opinion)
        with np.errstate(over="ignore", invalid="ignore"):
            centred = _centred(values, has_opinion, same)
            std = _group_std(centred, has_opinion)
            normalized = centred / (std[:, None] + STD_EPSILON)
        _check_size(values, normalized, std)
        summed += weights[name] * normalized
        totals += weights[name] * values
        equal &= same | (weights[name] == 0)
    # The sums of each group add up to 0. Subtracting their mean would only turn exact zeros into
    # rounding errors.
    advantages = summed / (_std(summed[counts]) + STD_EPSILON)
    plain = group_advantages(totals, scale_rewards="none", counts=counts)
    return replace(plain, advantages=advantages, equal_rewards=equal)


def equal_rewards(
    rewards: Float64[np.ndarray, "groups generations"],
    counts: Bool[np.ndarray, "groups generations"],
) -> Bool[np.ndarray, " groups"]:
    """Return for each group whether the rewards that count are all the same, compared exactly.

    This is the one test of a group that teaches nothing: a standard deviation of equal numbers may
    differ from 0 in its last bit. True for a group in which fewer than two completions count.
    """
    highest = np.where(counts, rewards, -np.inf).max(axis=1)
    return highest <= np.where(counts, rewards, np.inf).min(axis=1)


def reward_metrics(
    result: GroupAdvantages, rewards: Mapping[str, Float64[np.ndarray, "groups generations"]]
) -> dict[str, float]:
    """Return ``reward*``, ``frac_reward_zero_std``, ``rewards/<function>/{mean,std,none_ratio}``.

    ``completions/num_alone`` counts those whose prompt has no other completion that counts: there
    is nothing to compare them with, so their advantage is 0. ``rewards`` holds each reward
    function's scores before weights, NaN where it has no opinion; ``none_ratio`` is the fraction of
    those. Mean and standard deviation are over the others that count, and omitted where none does.
    """
    metrics = {
        "frac_reward_zero_std": float(result.equal_rewards.mean()),
        "completions/num_alone": float((result.counts.sum(axis=1) == 1).sum()),
    }
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


def _centred(rewards: np.ndarray, counts: np.ndarray, equal: np.ndarray) -> np.ndarray:
    """Return rewards minus the mean of their group; 0 where one does not count."""
    num_counted = counts.sum(axis=1, keepdims=True)
    means = (rewards * counts).sum(axis=1, keepdims=True) / np.maximum(num_counted, 1)
    centred = np.where(counts, rewards - means, 0.0)
    # A mean of equal numbers may differ in the last bit, which the division would amplify.
    centred[equal] = 0.0
    return centred


def _group_std(centred: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.sqrt((centred**2).sum(axis=1) / np.maximum(counts.sum(axis=1) - 1, 1))


def _std(scores: np.ndarray) -> float:
    if not len(scores) or scores.max() == scores.min():
        return 0.0
    return float(scores.std(ddof=1))


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
