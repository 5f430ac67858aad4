"""The policy loss: clipped surrogate and KL penalty; microbatches and ranks sum up to the loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float

from moe_replay.grpo.metrics import MAX_LOG_RATIO, Tally
from moe_replay.recipe.sections.training import GrpoSection


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossInputs:
    """Sampled tokens of one microbatch, one entry each."""

    new_logprobs: Float[torch.Tensor, " tokens"]
    """Under the weights being trained, at the sampling temperature, in nats; differentiable."""
    log_ratio: Float[torch.Tensor, " tokens"]
    """Log of the importance ratio that the loss compares, see `losses`; differentiable."""
    ref_logprobs: Float[torch.Tensor, " tokens"] | None
    """Of the reference model; None when ``beta`` is 0."""
    advantages: Float[torch.Tensor, " tokens"]
    """Advantage of the token's sample."""
    weights: Float[torch.Tensor, " tokens"]
    """Weight of the token in the mini-batch loss; 0 for tokens that do not train."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossStatistics:
    """Sums over the trained tokens of a microbatch, to be added up over microbatches and ranks."""

    num_tokens: float
    """Tokens with a weight."""
    loss: float
    """Part of the mini-batch loss."""
    num_clipped_low: float
    """Tokens below the clip range with a negative advantage: they get no gradient."""
    num_clipped_high: float
    """Tokens above it with a positive advantage: likewise."""
    num_bounded: float
    """Tokens with a log ratio above `MAX_LOG_RATIO`, in the surrogate or in the KL term."""
    num_pulled: float
    """Tokens whose surrogate has a gradient: an advantage, not clipped, a probability below 1."""
    ratio_sum: float
    """Sum of importance ratios new / old, each at most ``exp(MAX_LOG_RATIO)``."""
    kl_sum: float
    """Sum of the k3 estimate of KL(new || reference), in nats."""


CERTAIN = -1e-3
"""Log-probability from which on a token is certain: its gradient may vanish in float32."""


def policy_loss(inputs: LossInputs, settings: GrpoSection) -> tuple[torch.Tensor, LossStatistics]:
    """Return the microbatch's part of the loss, and its statistics.

    Per token: ``-min(r A, clip(r, 1-eps, 1+eps_high) A) + beta k3``, with ``r = exp(log_ratio)``
    and ``k3 = exp(ref - new) - (ref - new) - 1``. A token without a weight, or a clipped one, has
    gradient 0 for any ratio. Above `MAX_LOG_RATIO` an exponential continues along its tangent, so
    value and gradient stay finite and keep their direction; up to there nothing changes, to the
    last bit. Example: ratio 1.5, advantage 1, eps_high 0.2: the surrogate is -1.2 and the token
    clipped; with advantage -1 it is 1.5 and not clipped.

    Source: GRPO, arXiv 2402.03300, equations 3 and 4; asymmetric clip from DAPO, arXiv 2503.14476,
    equation 10.
    """
    trains = inputs.weights > 0
    log_ratio = _where(trains, inputs.log_ratio)
    ratio = bounded_exp(log_ratio)
    clipped = ratio.clamp(1 - settings.epsilon, 1 + settings.epsilon_high)
    per_token = -torch.minimum(ratio * inputs.advantages, clipped * inputs.advantages)
    kl = torch.zeros_like(ratio)
    bounded = log_ratio > MAX_LOG_RATIO
    if settings.beta:
        assert inputs.ref_logprobs is not None
        difference = _where(trains, inputs.ref_logprobs - inputs.new_logprobs)
        k3 = bounded_exp(difference) - difference - 1
        per_token = per_token + settings.beta * k3
        kl = k3.detach()
        bounded = bounded | (difference > MAX_LOG_RATIO)
    loss = (per_token * inputs.weights).sum()
    low = (ratio < 1 - settings.epsilon) & (inputs.advantages < 0) & trains
    high = (ratio > 1 + settings.epsilon_high) & (inputs.advantages > 0) & trains
    pulled = trains & (inputs.advantages != 0) & ~low & ~high & (inputs.new_logprobs < CERTAIN)
    counted = {
        "num_tokens": trains,
        "num_clipped_low": low,
        "num_clipped_high": high,
        "num_bounded": bounded,
        "num_pulled": pulled,
        "ratio_sum": torch.exp(log_ratio.detach().clamp(max=MAX_LOG_RATIO)) * trains,
        "kl_sum": kl * trains,
        "loss": per_token.detach() * inputs.weights,
    }
    # One transfer for all of them, because each waits for the device.
    sums = torch.stack(list(counted.values())).sum(dim=1).tolist()
    return loss, LossStatistics(**dict(zip(counted, sums, strict=True)))


def bounded_exp(values: Float[torch.Tensor, " tokens"]) -> Float[torch.Tensor, " tokens"]:
    """Return ``exp(x)`` up to M = `MAX_LOG_RATIO`, above it the tangent: ``exp(M) (1 + x - M)``.

    Clamping alone would remove the gradient just where a policy has moved farthest.
    """
    inside = torch.exp(values.clamp(max=MAX_LOG_RATIO))
    return inside * (1 + torch.relu(values - MAX_LOG_RATIO))


def _where(trains: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    # Masks before anything is computed: NaN times a mask of 0 is NaN, and so is its gradient.
    return torch.where(trains, values, torch.zeros_like(values))


def update_tally(statistics: Iterable[LossStatistics], *, with_kl: bool) -> Tally:
    """Tally one rank's microbatches of an update; ``kl`` only ``with_kl``, else it would be 0."""
    tally = Tally()
    for part in statistics:
        tokens = int(part.num_tokens)
        tally.add_sum("loss", part.loss)
        tally.add_mean("policy_ratio/mean", total=part.ratio_sum, count=tokens)
        for name, total in (
            ("low_mean", part.num_clipped_low),
            ("high_mean", part.num_clipped_high),
            ("region_mean", part.num_clipped_low + part.num_clipped_high),
        ):
            tally.add_mean(f"clip_ratio/{name}", total=total, count=tokens)
        tally.add_mean("policy_ratio/bounded_frac", total=part.num_bounded, count=tokens)
        if with_kl:
            tally.add_mean("kl", total=part.kl_sum, count=tokens)
    return tally


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
