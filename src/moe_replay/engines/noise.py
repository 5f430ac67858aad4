"""Draw tokens from logits with noise that belongs to a completion, whatever batch it runs in.

Each completion has its own stream of uniforms, from a counter-based generator keyed by the run's
seed, the request and the completion's index. A token is the inverse of the cumulative distribution
at its position's uniform, so the same logits give the same token in any batch, on any number of
ranks::

    probabilities  0.1  0.5  0.4
    cumulative     0.1  0.6  1.0      uniform 0.55 draws token 1, uniform 0.6 token 2

In: logits, uniforms. Out: token ids, log-probabilities, the ids that truncation left.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64, UInt32

from moe_replay.errors import DivergedError

NOT_A_LOGPROB = 9999.0
"""Stands for a NaN log-probability where NaN cannot travel: in vLLM's JSON."""


def completion_noise(
    *, seed: int, request_id: int, completion: int, length: int
) -> Float64[np.ndarray, " length"]:
    """Return the uniforms in [0, 1) of one completion, one a position.

    A longer stream starts with the shorter one.
    """
    # The first counter word counts the blocks of one stream, so streams never meet.
    counter = np.array([0, completion, request_id, 0], dtype=np.uint64)
    key = np.array([seed, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=key)).random(length)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """One token a row, and what it was drawn from."""

    ids: Int64[torch.Tensor, " rows"]
    """Token ids."""
    rollout_logprobs: Float32[torch.Tensor, " rows"]
    """Log-probability of each under ``softmax(logits / temperature)`` over the full vocabulary."""
    is_kept: Bool[torch.Tensor, "rows known"] | None = None
    """Ids that truncation left; none of a row from which it cut nothing off. None: it cuts nothing
    off any row."""
    kept_weight: Float64[torch.Tensor, " rows"] | None = None
    """Probability of what it left; None as above."""

    def among_kept(self) -> tuple[Float32[torch.Tensor, " rows"], Float32[torch.Tensor, " rows"]]:
        """Return log-probabilities among the ids that truncation left, and the mass of these.

        Token of probability 0.3, of whose row ids with 0.6 were left: log 0.5, and 0.6.
        """
        if self.is_kept is None or self.kept_weight is None:
            return self.rollout_logprobs, torch.ones_like(self.rollout_logprobs)
        mass = torch.where(self.is_kept.any(dim=-1), self.kept_weight, 1.0)
        # A weight of one id may exceed that of all by rounding; NaN stays.
        logprobs = (self.rollout_logprobs.double() - mass.log()).clamp_max(0.0)
        return logprobs.float(), mass.float()

    def sets(self) -> list[UInt32[np.ndarray, " _"]]:
        """Return each row's ids that truncation left, ascending; none where it cut nothing off."""
        if self.is_kept is None:
            return [np.empty(0, dtype=np.uint32)] * len(self.ids)
        rows, ids = self.is_kept.nonzero().cpu().numpy().T
        ends = np.cumsum(np.bincount(rows, minlength=len(self.ids)))[:-1]
        return np.split(ids.astype(np.uint32), ends)


def sample_tokens(
    logits: Float[torch.Tensor, "rows vocabulary"],
    noise: Float64[torch.Tensor, " rows"],
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    num_known_ids: int | None = None,
) -> Drawn:
    """Return one token a row, and its log-probability under ``softmax(logits / temperature)``.

    ``top_k``, ``top_p`` and ``min_p`` limit what can be drawn, and so does ``num_known_ids``: ids
    from there on, which pad a vocabulary beyond its tokenizer, are never drawn. Temperature 0 takes
    the most likely token (the lowest id of equals), and its log-probability is the one at
    temperature 1. Logits that are NaN or infinite give token 0 with log-probability NaN.

    Examples:
        >>> noise = torch.tensor([0.6], dtype=torch.float64)
        >>> drawn = sample_tokens(torch.zeros(1, 4), noise, temperature=1.0)
        >>> drawn.ids, drawn.rollout_logprobs
        (tensor([2]), tensor([-1.3863]))
    """
    scaled = logits.float()
    if temperature > 0:
        scaled = scaled / temperature
    logprobs = torch.log_softmax(scaled, dim=-1)
    weights = truncated = None
    if temperature == 0:
        ids = logprobs[:, :num_known_ids].argmax(dim=-1)
    else:
        weights = logprobs[:, :num_known_ids].double().exp()
        truncated = _truncate(weights, top_k, top_p, min_p)
        ids = _invert(truncated, noise)
    # One NaN logit makes its whole row NaN, and the index found there may even lie past the end.
    ids = ids.masked_fill(logprobs[:, 0].isnan(), 0)
    # So may it when padding ids have all the probability and nothing else has a weight.
    if num_known_ids is not None:
        ids = ids.clamp_max(num_known_ids - 1)
    drawn = Drawn(ids=ids, rollout_logprobs=logprobs.gather(1, ids[:, None]).squeeze(1))
    if weights is None or truncated is None or truncated is weights:
        return drawn
    is_kept = truncated > 0
    # Where nothing was cut off the distribution is that of the full vocabulary, padding ids too.
    is_kept &= ~is_kept.eq(weights > 0).all(dim=-1, keepdim=True)
    return replace(drawn, is_kept=is_kept, kept_weight=truncated.sum(dim=-1))


def _truncate(
    weights: Float64[torch.Tensor, "rows vocabulary"], top_k: int, top_p: float, min_p: float
) -> Float64[torch.Tensor, "rows vocabulary"]:
    keep_all = top_k == 0 or top_k >= weights.shape[1]
    if keep_all and top_p >= 1 and min_p <= 0:
        return weights
    # A stable sort breaks ties by id, so that exactly top_k weights remain.
    ordered, ids = torch.sort(weights, dim=-1, descending=True, stable=True)
    if not keep_all:
        ordered[:, top_k:] = 0
    if top_p < 1:
        before = ordered.cumsum(dim=-1) - ordered
        ordered[before >= top_p * ordered.sum(dim=-1, keepdim=True)] = 0
    if min_p > 0:
        ordered[ordered < min_p * ordered[:, :1]] = 0
    return torch.zeros_like(weights).scatter_(1, ids, ordered)


def _invert(
    weights: Float64[torch.Tensor, "rows vocabulary"], noise: Float64[torch.Tensor, " rows"]
) -> Int64[torch.Tensor, " rows"]:
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1]
    # Below the total even after rounding, so that the token found has a weight above 0.
    target = torch.minimum(noise * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target[:, None], right=True).squeeze(1)


def refuse_no_numbers(
    rollout_logprobs: Float32[np.ndarray, " completion"], *, where: str, policy_version: int
) -> None:
    """Raise `DivergedError` if a log-probability is NaN, or `NOT_A_LOGPROB` in its stead."""
    bad = np.isnan(rollout_logprobs) | (rollout_logprobs >= NOT_A_LOGPROB)
    if bad.any():
        raise no_numbers(where, int(bad.argmax()), policy_version)


def no_numbers(where: str, position: int, policy_version: int) -> DivergedError:
    """Return the error for a sampled token whose logits are not finite."""
    cause = (
        "training has diverged: lower optimizer.lr, and resume from a checkpoint before it"
        if policy_version
        else "the checkpoint holds NaN, or its values overflow in the engine's number format: see "
        "rollout.dtype"
    )
    return DivergedError(
        f"{where}: the logits of sampled token {position} are not finite under policy version "
        f"{policy_version}, so no token can be drawn; {cause}"
    )
