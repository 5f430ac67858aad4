"""The policy loss of a microbatch, and its statistics; parts of microbatches and ranks add up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from moe_replay.grpo.loss import levels, losses
from moe_replay.grpo.loss.corrections import engine_weights, is_on_policy
from moe_replay.grpo.loss.divergence import kl_term
from moe_replay.grpo.loss.losses import Terms
from moe_replay.grpo.loss.rows import BatchSize, TokenRows, bounded_exp
from moe_replay.grpo.metrics import MAX_LOG_RATIO, Tally
from moe_replay.recipe.sections.policy_loss import PolicyLossKeys


@dataclass(frozen=True, slots=True, kw_only=True)
class LossStatistics:
    """Sums over the trained tokens of a microbatch, to be added up over microbatches and ranks."""

    num_tokens: float
    """Tokens that train."""
    loss: float
    """Part of the mini-batch loss."""
    num_clipped_low: float
    """Tokens that the loss limits because they became much less likely, see `Terms.low`."""
    num_clipped_high: float
    """Tokens that it limits because they became much more likely, see `Terms.high`."""
    num_bounded: float
    """Tokens with a log ratio above `MAX_LOG_RATIO`, in the surrogate or in the KL term."""
    num_pulled: float
    """Tokens whose policy term has a gradient: an advantage and a weight, not clipped, a
    probability below 1, and no correction that takes all but `FAINT` of it."""
    num_off_policy: float
    """Tokens of samples that ``grpo.off_policy_sequence_mask_delta`` leaves alone."""
    num_uncertain: float
    """Tokens that ``grpo.top_entropy_quantile`` keeps."""
    ratio_sum: float
    """Sum of importance ratios new / old, each at most ``exp(MAX_LOG_RATIO)``."""
    kl_sum: float
    """Sum of the k3 estimate of KL(new || reference), in nats."""


FAINT = 1e-12
"""Weight from which down a correction may leave no gradient in float32."""
CERTAIN = -1e-3
"""Log-probability from which on a token is certain: its gradient may vanish in float32."""


def policy_loss(
    rows: TokenRows, batch: BatchSize, keys: PolicyLossKeys
) -> tuple[torch.Tensor, LossStatistics]:
    """Return the microbatch's part of the loss, and its statistics.

    ``sum of weight (L C + beta KL) - entropy_coef sum of H / tokens``: L is what the loss makes of
    a token's ratio (`losses`), at its level (`levels`); C are constant factors of the policy term
    alone, such as those that correct the engine gap (`corrections`). A token that does not train
    has gradient 0 whatever its values. Above `MAX_LOG_RATIO` an exponential continues along its
    tangent, so value and gradient stay finite and keep their direction; up to there nothing
    changes, to the last bit. Collective over ranks that share samples.

    Example: ratio 1.5, advantage 1, eps_high 0.2: L is -1.2 and the token clipped; with advantage
    -1 it is 1.5 and not clipped.
    """
    rows = rows.masked()
    log_ratio = getattr(levels, keys.importance_sampling_level)(rows)
    terms: Terms = getattr(losses, keys.loss_type)(bounded_exp(log_ratio), rows, batch, keys)
    factors, off_policy = _policy_factors(rows, keys)
    per_token = terms.per_token
    pulled = rows.trains & (rows.advantages != 0) & ~terms.is_still
    pulled = pulled & (rows.new_logprobs < CERTAIN)
    for factor in factors:
        per_token = per_token * factor
        pulled = pulled & (factor > FAINT)
    bounded = log_ratio > MAX_LOG_RATIO
    kl = torch.zeros_like(per_token)
    if keys.has_kl_term:
        term = kl_term(rows, keys)
        per_token = per_token + keys.beta * term.per_token
        kl = term.k3
        bounded = bounded | term.is_bounded
    weights = terms.weights * rows.trains.to(per_token.dtype)
    parts = per_token * weights
    if keys.entropy_coef:
        parts = parts - keys.entropy_coef * _entropy_bonus(rows, batch)
    counted = {
        "num_tokens": rows.trains,
        "num_clipped_low": terms.low & rows.trains,
        "num_clipped_high": terms.high & rows.trains,
        "num_bounded": bounded,
        "num_pulled": pulled,
        "num_off_policy": off_policy & rows.trains,
        "num_uncertain": rows.trains
        if rows.is_uncertain is None
        else rows.is_uncertain & rows.trains,
        "ratio_sum": torch.exp(log_ratio.detach().clamp(max=MAX_LOG_RATIO)) * rows.trains,
        "kl_sum": kl * rows.trains,
        "loss": parts.detach(),
    }
    # One transfer for all of them, because each waits for the device.
    sums = torch.stack(list(counted.values())).sum(dim=1).tolist()
    return parts.sum(), LossStatistics(**dict(zip(counted, sums, strict=True)))


def _policy_factors(
    rows: TokenRows, keys: PolicyLossKeys
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return constant factors of the policy term, and the tokens that are left as off-policy."""
    factors: list[torch.Tensor] = []
    off_policy = torch.zeros_like(rows.trains)
    if keys.off_policy_sequence_mask_delta is not None:
        kept = is_on_policy(rows, keys.off_policy_sequence_mask_delta)
        factors.append(kept)
        off_policy = ~kept
    if rows.is_uncertain is not None:
        factors.append(rows.is_uncertain)
    if keys.rollout_importance_sampling_mode != "none":
        factors.append(engine_weights(rows, keys).weights)
    return factors, off_policy


def _entropy_bonus(rows: TokenRows, batch: BatchSize) -> torch.Tensor:
    """Return each token's part of the mean entropy of the tokens that the policy term acts on."""
    assert rows.entropies is not None
    if rows.is_uncertain is None:
        return rows.entropies / batch.num_tokens
    return rows.entropies * (rows.is_uncertain & rows.trains) / batch.num_uncertain


def update_tally(statistics: Iterable[LossStatistics], keys: PolicyLossKeys) -> Tally:
    """Tally one rank's microbatches of an update; what the recipe switches off is omitted."""
    tally = Tally()
    for part in statistics:
        tokens = int(part.num_tokens)
        tally.add_sum("loss", part.loss)
        for name, total in _means(part, keys).items():
            tally.add_mean(name, total=total, count=tokens)
    return tally


def _means(part: LossStatistics, keys: PolicyLossKeys) -> dict[str, float]:
    """Return sums over tokens by the name of their mean."""
    low, high = part.num_clipped_low, part.num_clipped_high
    means = {"policy_ratio/mean": part.ratio_sum, "policy_ratio/bounded_frac": part.num_bounded}
    if keys.loss_type == "cispo":
        means["cispo_clip_ratio"] = high
    elif keys.loss_type != "sapo":
        means |= {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high}
        means["clip_ratio/region_mean"] = low + high
    if keys.has_kl_term:
        means["kl"] = part.kl_sum
    if keys.off_policy_sequence_mask_delta is not None:
        means["rollout_correction/off_policy_frac"] = part.num_off_policy
    if keys.top_entropy_quantile < 1:
        means["entropy/kept_frac"] = part.num_uncertain
    return means


def step_tally(updates: Sequence[Tally]) -> Tally:
    """Combine the updates of a step, each merged over all ranks before.

    ``loss`` is averaged over updates; the ``clip_ratio`` means are over the tokens of all updates,
    and ``clip_ratio/low_min`` and ``clip_ratio/high_max`` those of the extreme updates.
    """
    step = Tally()
    for update in updates:
        values = update.finish()
        for name, (kind, value, count) in update._entries.items():
            step._add(name, "mean" if kind == "sum" else kind, value, count if kind != "sum" else 1)
        if "clip_ratio/low_mean" in values:
            step.add_min("clip_ratio/low_min", values["clip_ratio/low_mean"])
            step.add_max("clip_ratio/high_max", values["clip_ratio/high_mean"])
    return step
