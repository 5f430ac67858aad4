"""Weights that correct the engine gap: constant factors of the policy term, and of nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float

from moe_replay.grpo.loss.rows import TokenRows
from moe_replay.grpo.metrics import MAX_LOG_RATIO, Tally
from moe_replay.recipe.sections.policy_loss import PolicyLossKeys


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EngineWeights:
    """A weight for each token, from its engine gap."""

    weights: Float[torch.Tensor, " tokens"]
    """Without gradient; 0 rejects the token."""
    is_limited: Bool[torch.Tensor, " tokens"]
    """Whether what was tested lay outside the limits."""


def engine_weights(rows: TokenRows, keys: PolicyLossKeys) -> EngineWeights:
    """Weigh tokens by g = old / engine probability; collective over ranks that share samples.

    ``token`` tests g of each token, ``sequence`` the product over its sample, ``geometric`` their
    geometric mean; the weight is what was tested, constant in the gradient. ``truncate`` limits it
    to [min, threshold], ``mask`` makes it 0 outside, the limits included. A sample that
    ``geometric_mask`` keeps is weighed token by token, with g limited as by ``token_truncate``. A
    log is bounded at `MAX_LOG_RATIO` before it is exponentiated.

    Example: g = 2, 1, 1/4 and a threshold of 1.5. ``token_truncate`` gives 1.5, 1, 1/4,
    ``token_mask`` 0, 1, 1/4, ``sequence_truncate`` 1/2 for each, ``geometric_truncate`` 0.794.

    Source: TIS, arXiv 2510.18855 and F. Yao et al., "Your efficient RL framework secretly brings
    you off-policy RL training"; two-sided masks, IcePop, arXiv 2510.18855.
    """
    level, _, action = keys.rollout_importance_sampling_mode.partition("_")
    log_gap = rows.log_gap.detach()
    tested = {
        "token": lambda: log_gap,
        "sequence": lambda: rows.sample_sums(log_gap),
        "geometric": lambda: rows.sample_means(log_gap),
    }[level]()
    lowest = keys.rollout_importance_sampling_min or 0.0
    highest = keys.rollout_importance_sampling_threshold
    gap = torch.exp(tested.clamp(max=MAX_LOG_RATIO))
    outside = (gap < lowest) | (gap > highest)
    if action == "truncate":
        weights = gap.clamp(lowest, highest)
    else:
        kept = gap
        if level == "geometric":
            kept = torch.exp(log_gap.clamp(max=MAX_LOG_RATIO)).clamp(lowest, highest)
        weights = torch.where(outside, torch.zeros_like(gap), kept)
    return EngineWeights(weights=weights, is_limited=outside)


def is_on_policy(rows: TokenRows, delta: float) -> Bool[torch.Tensor, " tokens"]:
    """Return False at tokens of a sample to be left alone: it is bad, and no longer the policy's.

    That is one whose advantage is negative and whose mean of engine minus new log-probability is
    above ``delta``; collective over ranks that share samples. The mean holds both the engine gap
    and policy drift. Example: engine 0.8, new 0.4, advantage -1: ln 2 = 0.69 is above 0.5.

    Source: DeepSeek-V3.2, arXiv 2512.02556, equation 9.
    """
    assert rows.rollout_logprobs is not None
    distance = rows.sample_means(rows.rollout_logprobs - rows.new_logprobs)
    return ~((rows.advantages < 0) & (distance > delta))


def correction_tally(
    old_logprobs: Sequence[Float[np.ndarray, " _"]],
    rollout_logprobs: Sequence[Float[np.ndarray, " _"]],
    keys: PolicyLossKeys,
) -> Tally:
    """Tally what the correction makes of a step's samples, whether they train or not.

    Over tokens, with W their weight: ``rollout_correction/is_weight_mean`` mean(W),
    ``is_weight_sq_mean`` mean(W^2), ``clipped_frac`` those outside the limits and
    ``rejected_frac`` those whose W is 0; nothing where none is corrected. Both arguments hold one
    array for each sample.
    """
    tally = Tally()
    lengths = [len(values) for values in old_logprobs]
    if keys.rollout_importance_sampling_mode == "none" or not sum(lengths):
        return tally
    old, rollout = (
        torch.from_numpy(np.concatenate(parts).astype(np.float64))
        for parts in (old_logprobs, rollout_logprobs)
    )
    rows = TokenRows(
        new_logprobs=old,
        old_logprobs=old,
        rollout_logprobs=rollout,
        advantages=torch.zeros_like(old),
        trains=torch.ones_like(old, dtype=torch.bool),
        sample=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        lengths=torch.tensor(lengths, dtype=old.dtype),
        sum_over_ranks=lambda values: values,
    )
    found = engine_weights(rows, keys)
    for name, values in (
        ("is_weight_mean", found.weights),
        ("is_weight_sq_mean", found.weights**2),
        ("clipped_frac", found.is_limited),
        ("rejected_frac", found.weights == 0),
    ):
        total = float(values.sum())
        tally.add_mean(f"rollout_correction/{name}", total=total, count=len(values))
    return tally


def effective_size(metrics: dict[str, float]) -> dict[str, float]:
    """Return ``rollout_correction/ess`` = mean(W)^2 / mean(W^2) in place of the mean of squares.

    1 where all weights are equal, 1/n where one of n tokens has it all; 0 when all are rejected.
    """
    squares = metrics.pop("rollout_correction/is_weight_sq_mean", None)
    if squares is None:
        return metrics
    mean = metrics["rollout_correction/is_weight_mean"]
    return metrics | {"rollout_correction/ess": mean**2 / squares if squares else 0.0}
