"""One pass of a model over one finished sequence, and the exact KL between two of them.

In: tokens, routes to replay. Out: Pass. `Trainer` is the seam for another trainer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int32

from moe_replay.routing import RouteForm, RoutingTrace

_MAX_WORDS = 1 << 22
"""Log-probabilities of a chunk of tokens over all words: 32 MiB in float64 for each side."""

_TOKENS = 256
"""Tokens whose log-probabilities over all words are made together for one side."""

Distributions = Callable[[slice, float], torch.Tensor]
"""``(sampled tokens, temperature) -> [tokens, words]``, log-probabilities in float64, nats."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pass:
    """What a model made of one sequence of P prompt and S sampled tokens."""

    token_logprobs: Float32[np.ndarray, " sampled"]
    """``[S]``, in nats, at the sampling temperature."""
    live: RoutingTrace | None
    """The routes that its routers chose; None for a dense model, and in a pass that replays."""
    margins: Float32[np.ndarray, "tokens layers"] | None
    """``[P + S, layers]``, how close each choice was; None where it is not known."""
    distributions: Distributions
    """Log-probabilities over all words, a few tokens at a time; until the next pass."""


@runtime_checkable
class Trainer(Protocol):
    """A model that runs finished sequences, one at a time, with its own routes or given ones."""

    @property
    def form(self) -> RouteForm | None:
        """Layers, experts and top-k of its routers; None for a dense model."""
        ...

    def run(
        self,
        token_ids: Int32[np.ndarray, " tokens"],
        prompt_length: int,
        *,
        temperature: float,
        replayed: RoutingTrace | None,
    ) -> Pass:
        """Run the sequence; with ``replayed`` under its routes, rows without one live."""
        ...


def exact_kl(
    first: Distributions,
    second: Distributions,
    *,
    num_tokens: int,
    num_words: int,
    temperature: float,
) -> Float64[np.ndarray, " sampled"]:
    """Return KL(first || second) over all words at each sampled token, in nats.

    A few tokens at a time, so that ``[tokens, words]`` of a long sequence never exists. Example:
    (1/2, 1/2) against (1/4, 3/4) is ln(2)/2 + ln(2/3)/2 = 0.144.
    """
    step = max(1, _MAX_WORDS // num_words)
    found = [np.zeros(0)]
    for start in range(0, num_tokens, step):
        here = slice(start, min(start + step, num_tokens))
        p, q = first(here, temperature), second(here, temperature)
        # A word that the first side rules out has no share.
        terms = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))
        found.append(terms.sum(dim=-1).cpu().numpy())
    return np.concatenate(found)


def logprobs_of(
    distributions: Distributions, token_ids: Int32[np.ndarray, " sampled"], temperature: float
) -> Float32[np.ndarray, " sampled"]:
    """Return the log-probability of each sampled token, in nats, some tokens at a time."""
    sampled = torch.from_numpy(token_ids.astype(np.int64))
    found = [np.zeros(0, dtype=np.float32)]
    for start in range(0, len(sampled), _TOKENS):
        here = slice(start, min(start + _TOKENS, len(sampled)))
        values = distributions(here, temperature)
        own = values.gather(1, sampled[here, None].to(values.device))[:, 0]
        found.append(own.float().cpu().numpy())
    return np.concatenate(found)


def log_softmax(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return log-probabilities in float64 of logits at a temperature."""
    return torch.log_softmax(logits.double() / temperature, dim=-1)
