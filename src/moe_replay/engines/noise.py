"""Draw tokens from logits with noise that belongs to a completion, whatever batch it runs in.

Each completion has its own stream of uniforms, from a counter-based generator keyed by the run's
seed, the request and the completion's index. A token is the inverse of the cumulative distribution
at its position's uniform, so the same logits give the same token in any batch, on any number of
ranks::

    probabilities  0.1  0.5  0.4
    cumulative     0.1  0.6  1.0      uniform 0.55 draws token 1, uniform 0.6 token 2

In: logits, uniforms. Out: token ids and log-probabilities.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64

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


def sample_tokens(
    logits: Float[torch.Tensor, "rows vocabulary"],
    noise: Float64[torch.Tensor, " rows"],
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    num_known_ids: int | None = None,
) -> tuple[Int64[torch.Tensor, " rows"], Float32[torch.Tensor, " rows"]]:
    """Return one token a row, and its log-probability under ``softmax(logits / temperature)``.

    ``top_k`` and ``top_p`` limit what can be drawn, and so does ``num_known_ids``: ids from there
    on, which pad a vocabulary beyond its tokenizer, are never drawn. The log-probability is that of
    the full vocabulary, because that is what a trainer recomputes. Temperature 0 takes the most
    likely token (the lowest id of equals), and its log-probability is the one at temperature 1.
    Logits that are NaN or infinite give token 0 with log-probability NaN.

    Example:
        >>> noise = torch.tensor([0.6], dtype=torch.float64)
        >>> sample_tokens(torch.zeros(1, 4), noise, temperature=1.0)
        (tensor([2]), tensor([-1.3863]))
    """
    scaled = logits.float()
    if temperature > 0:
        scaled = scaled / temperature
    logprobs = torch.log_softmax(scaled, dim=-1)
    if temperature == 0:
        ids = logprobs[:, :num_known_ids].argmax(dim=-1)
    else:
        weights = logprobs[:, :num_known_ids].double().exp()
        ids = _invert(_truncate(weights, top_k, top_p), noise)
    # One NaN logit makes its whole row NaN, and the index found there may even lie past the end.
    ids = ids.masked_fill(logprobs[:, 0].isnan(), 0)
    # So may it when padding ids have all the probability and nothing else has a weight.
    if num_known_ids is not None:
        ids = ids.clamp_max(num_known_ids - 1)
    return ids, logprobs.gather(1, ids[:, None]).squeeze(1)


def _truncate(
    weights: Float64[torch.Tensor, "rows vocabulary"], top_k: int, top_p: float
) -> Float64[torch.Tensor, "rows vocabulary"]:
    keep_all = top_k == 0 or top_k >= weights.shape[1]
    if keep_all and top_p >= 1:
        return weights
    # A stable sort breaks ties by id, so that exactly top_k weights remain.
    ordered, ids = torch.sort(weights, dim=-1, descending=True, stable=True)
    if not keep_all:
        ordered[:, top_k:] = 0
    if top_p < 1:
        before = ordered.cumsum(dim=-1) - ordered
        ordered[before >= top_p * ordered.sum(dim=-1, keepdim=True)] = 0
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
