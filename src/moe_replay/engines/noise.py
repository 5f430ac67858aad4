"""Draw tokens from logits with noise that belongs to a completion, not to the batch that it happens to run in.

Each completion has its own stream of uniforms, from a counter-based generator keyed by the run's seed, the request
and the completion's number. A token is the inverse of the cumulative distribution at its position's uniform, so the
same logits give the same token in any batch, on any number of ranks.

In: logits, uniforms. Out: token ids and log-probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64

from moe_replay.engines.types import EngineDescription, Request, SamplingParams
from moe_replay.errors import EngineError, RecipeError

_WORD = 1 << 64


def check_sampling(sampling: SamplingParams) -> None:
    """Raise `RecipeError` when a setting lies outside its range."""
    ranges = (
        ("max_completion_length", sampling.max_completion_length >= 1, "at least 1"),
        ("temperature", 0.0 <= sampling.temperature < float("inf"), "0 (take the best) or more"),
        ("top_p", 0.0 < sampling.top_p <= 1.0, "above 0 and at most 1 (keep all)"),
        ("top_k", sampling.top_k >= 0, "0 (keep all) or more"),
        ("seed", 0 <= sampling.seed < _WORD, "0 to 2**64 - 1"),
    )
    for name, holds, expected in ranges:
        if not holds:
            raise RecipeError(f"sampling.{name} is {getattr(sampling, name)}, expected {expected}")


def check_requests(
    requests: Sequence[Request],
    sampling: SamplingParams,
    *,
    description: EngineDescription,
    vocab_size: int,
) -> None:
    """Raise `EngineError` when a request is malformed, leaves no room in the context, or repeats a request id."""
    seen: set[int] = set()
    for request in requests:
        where = f"{description.name}: request {request.request_id}"
        prompt, room = request.prompt_ids, description.max_context_length
        if not 0 <= request.request_id < _WORD or request.request_id in seen:
            raise EngineError(
                f"{where}: expected ids from 0 to 2**64 - 1, each once in a call; requests of one id would sample with "
                "the same noise"
            )
        seen.add(request.request_id)
        if len(prompt) == 0 or request.num_generations < 1:
            raise EngineError(
                f"{where} has {len(prompt)} prompt tokens and asks for {request.num_generations} completions, "
                "expected at least one of each"
            )
        if prompt.min() < 0 or prompt.max() >= vocab_size:
            raise EngineError(
                f"{where} has token ids {prompt.min()} to {prompt.max()}, expected 0 to {vocab_size - 1}; the "
                "tokenizer belongs to another model"
            )
        if len(prompt) + sampling.max_completion_length > room:
            raise EngineError(
                f"{where}: a prompt of {len(prompt)} tokens and max_completion_length "
                f"{sampling.max_completion_length} exceed the context of {room} tokens; shorten one of them"
            )


def completion_noise(
    *, seed: int, request_id: int, completion: int, length: int
) -> Float64[np.ndarray, " length"]:
    """Return the uniforms in [0, 1) of one completion, one for each position; a longer stream starts with a shorter."""
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

    ``top_k`` and ``top_p`` limit what can be drawn, and so does ``num_known_ids``: ids from there on, which pad a vocabulary
    beyond its tokenizer, are never drawn. The log-probability is that of the full vocabulary, because that is what a trainer
    recomputes. Temperature 0 takes the most likely token (the lowest id of equals), and its
    log-probability is the one at temperature 1. Logits that are NaN or infinite give token 0 with log-probability NaN.

    Example:
        >>> sample_tokens(torch.zeros(1, 4), torch.tensor([0.6], dtype=torch.float64), temperature=1.0)
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
    # One NaN logit makes the whole row NaN, and the index found there may lie anywhere, even past the end.
    ids = ids.masked_fill(logprobs[:, 0].isnan(), 0)
    # Nor may it when padding ids have all the probability, so that nothing else has a weight.
    if num_known_ids is not None:
        ids = ids.clamp_max(num_known_ids - 1)
    return ids, logprobs.gather(1, ids[:, None]).squeeze(1)


def _truncate(
    weights: Float64[torch.Tensor, "rows vocabulary"], top_k: int, top_p: float
) -> Float64[torch.Tensor, "rows vocabulary"]:
    keep_all = top_k == 0 or top_k >= weights.shape[1]
    if keep_all and top_p >= 1:
        return weights
    # A stable order makes equal weights fall by id, so that exactly top_k of them remain.
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
