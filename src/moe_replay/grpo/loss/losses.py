"""What each loss makes of a token's ratio: one function for each `grpo.loss_type`, by its name.

To add a loss, write its function here, its name in `PolicyLossKeys.loss_type`, and its formula in
numpy in `tests/grpo/loss/oracle.py`. Example: completions of 2 and 4 tokens, at most 8. A token of
the first weighs 1/4 in ``grpo``, 1/6 in ``bnpo`` and ``dapo``, 1/16 in ``dr_grpo``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float

from moe_replay.grpo.loss.rows import BatchSize, TokenRows
from moe_replay.recipe.sections.policy_loss import PolicyLossKeys


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Terms:
    """A loss token by token, before corrections and KL."""

    per_token: Float[torch.Tensor, " tokens"]
    """What is averaged; differentiable."""
    weights: Float[torch.Tensor, " tokens"] | float
    """Weight of the token in the mini-batch: numerator 1, denominator of the whole mini-batch."""
    low: Bool[torch.Tensor, " tokens"]
    """Tokens limited because they became much less likely."""
    high: Bool[torch.Tensor, " tokens"]
    """Tokens limited because they became much more likely."""
    is_still: Bool[torch.Tensor, " tokens"]
    """Tokens without a gradient."""


Ratio = Float[torch.Tensor, " tokens"]


def grpo(ratio: Ratio, rows: TokenRows, batch: BatchSize, keys: PolicyLossKeys) -> Terms:
    """Clip, and average over a sample's tokens, then over samples.

    Source: GRPO, arXiv 2402.03300, equation 3.
    """
    return _clipped(ratio, rows, keys, 1 / (batch.num_samples * rows.length))


def dr_grpo(ratio: Ratio, rows: TokenRows, batch: BatchSize, keys: PolicyLossKeys) -> Terms:
    """Clip, and divide the sum by the same length for every sample.

    Source: Dr. GRPO, arXiv 2503.20783, equation 2.
    """
    return _clipped(ratio, rows, keys, 1 / (batch.num_samples * batch.max_completion_length))


def dapo(ratio: Ratio, rows: TokenRows, batch: BatchSize, keys: PolicyLossKeys) -> Terms:
    """Clip, and average over all tokens of the mini-batch.

    Source: DAPO, arXiv 2503.14476, equation 8.
    """
    return _clipped(ratio, rows, keys, 1 / batch.num_tokens)


def bnpo(ratio: Ratio, rows: TokenRows, batch: BatchSize, keys: PolicyLossKeys) -> Terms:
    """As `dapo`: elsewhere the two differ in what is called a batch, here the mini-batch."""
    return dapo(ratio, rows, batch, keys)


def cispo(ratio: Ratio, rows: TokenRows, batch: BatchSize, keys: PolicyLossKeys) -> Terms:
    """Weigh log-probabilities by ``min(r, epsilon_high)``, a constant; average over all tokens.

    Every token keeps its gradient. ``epsilon_high`` is the limit itself, not a distance from 1.

    Source: MiniMax-M1, arXiv 2506.13585, equation 4; the limit, ScaleRL, arXiv 2510.13786.
    """
    limited = ratio.detach().clamp(max=keys.epsilon_high)
    never = torch.zeros_like(rows.trains)
    return Terms(
        per_token=-limited * rows.advantages * rows.new_logprobs,
        weights=1 / batch.num_tokens,
        low=never,
        high=(ratio > keys.epsilon_high) & (rows.advantages > 0),
        is_still=never,
    )


def sapo(ratio: Ratio, rows: TokenRows, batch: BatchSize, keys: PolicyLossKeys) -> Terms:
    """Let a sigmoid of the ratio take the place of the clip; averaged as `grpo`.

    ``f(r) = 4/tau sigmoid(tau (r - 1))``, whose slope at 1 is 1; tau by the advantage's sign.

    Source: SAPO, arXiv 2511.20347, equations 5 and 6.
    """
    taus = torch.where(
        rows.advantages > 0,
        torch.full_like(ratio, keys.sapo_temperature_pos),
        torch.full_like(ratio, keys.sapo_temperature_neg),
    )
    gate = torch.sigmoid(taus * (ratio - 1))
    never = torch.zeros_like(rows.trains)
    return Terms(
        per_token=-gate * 4 / taus * rows.advantages,
        weights=1 / (batch.num_samples * rows.length),
        low=never,
        high=never,
        is_still=gate.detach() * (1 - gate.detach()) == 0,
    )


def dppo(ratio: Ratio, rows: TokenRows, batch: BatchSize, keys: PolicyLossKeys) -> Terms:
    """Stop a token once its probability, not its ratio, moved too far; average over all tokens.

    A token with a positive advantage stops above ``p_old + epsilon_high``, one with a negative
    below ``p_old - epsilon``. So a rare token may grow tenfold, and a sure one may not halve.

    Source: DPPO (total variation), arXiv 2602.04879; verl, ``compute_policy_loss_dppo_tv``.
    """
    with torch.no_grad():
        moved = rows.new_logprobs.exp() - rows.old_logprobs.exp()
    low = (moved < -keys.epsilon) & (rows.advantages < 0)
    high = (moved > keys.epsilon_high) & (rows.advantages > 0)
    per_token = -ratio * rows.advantages
    return Terms(
        per_token=torch.where(low | high, per_token.detach(), per_token),
        weights=1 / batch.num_tokens,
        low=low,
        high=high,
        is_still=low | high,
    )


def _clipped(
    ratio: Ratio,
    rows: TokenRows,
    keys: PolicyLossKeys,
    weights: Float[torch.Tensor, " tokens"] | float,
) -> Terms:
    """Return ``-min(min(r, delta) A, clip(r, 1-eps, 1+eps_high) A)``.

    Source: GRPO, arXiv 2402.03300, equation 3; asymmetric clip, DAPO, arXiv 2503.14476, equation
    10; ``delta``, INTELLECT-2, arXiv 2505.07291, which is the dual clip of arXiv 1912.09729.
    """
    advantages = rows.advantages
    clipped = ratio.clamp(1 - keys.epsilon, 1 + keys.epsilon_high)
    low = (ratio < 1 - keys.epsilon) & (advantages < 0)
    high = (ratio > 1 + keys.epsilon_high) & (advantages > 0)
    still = low | high
    limited = ratio
    if keys.delta is not None:
        limited = ratio.clamp(max=keys.delta)
        still = still | (ratio > keys.delta)
    return Terms(
        per_token=-torch.minimum(limited * advantages, clipped * advantages),
        weights=weights,
        low=low,
        high=high,
        is_still=still,
    )
