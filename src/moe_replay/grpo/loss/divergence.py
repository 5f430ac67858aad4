"""The KL term: estimates of KL(new || reference), by `grpo.kl_estimator`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float

from moe_replay.grpo.loss.rows import TokenRows, bounded_exp
from moe_replay.grpo.metrics import MAX_LOG_RATIO
from moe_replay.recipe.sections.policy_loss import PolicyLossKeys


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KlTerm:
    """Of each token."""

    per_token: Float[torch.Tensor, " tokens"]
    """What beta multiplies; differentiable."""
    k3: Float[torch.Tensor, " tokens"]
    """The k3 estimate, for the log; no gradient."""
    is_bounded: Bool[torch.Tensor, " tokens"]
    """Whether an exponential was bounded."""


def kl_term(rows: TokenRows, keys: PolicyLossKeys) -> KlTerm:
    """Estimate KL(new || reference) of each token, with d = ref - new.

    ``k3`` is ``e^d - d - 1``, whose gradient by new, ``1 - e^d``, is in expectation that of the
    forward KL; ``k2`` is ``d^2 / 2``, whose gradient -d is that of the reverse KL as long as the
    policy is the one that sampled. ``use_bias_correction_kl`` multiplies k3 by the token's ratio
    new / old, which has the gradient ``-r d``: that of the reverse KL for any policy. Example: d =
    ln 2 gives k3 = 0.307 and gradient -1, k2 = 0.240 and gradient -0.693.

    Source: J. Schulman, "Approximating KL divergence"; gradients, arXiv 2506.09477; the
    correction, DeepSeek-V3.2, arXiv 2512.02556, section 3.1.
    """
    assert rows.ref_logprobs is not None
    d = rows.ref_logprobs - rows.new_logprobs
    bounded = d > MAX_LOG_RATIO
    k3 = bounded_exp(d) - d - 1
    chosen = k3
    if keys.kl_estimator == "k2":
        chosen = d.square() / 2
    elif keys.use_bias_correction_kl:
        chosen = bounded_exp(rows.log_ratio) * k3
        bounded = bounded | (rows.log_ratio > MAX_LOG_RATIO)
    return KlTerm(per_token=chosen, k3=k3.detach(), is_bounded=bounded)
