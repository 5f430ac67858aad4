"""Synthetic routes that behave like a trained router's: skewed experts, similar neighbours, controlled drift.

In: shapes and a seed. Out: routes, traces and guard evidence. Called by: the tests of the core; tests of adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64

from moe_replay.routing import GuardEvidence, Origin, RoutingTrace


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SyntheticRoutes:
    """Routes of several samples, as they were recorded and as the drifted weights would choose them."""

    num_experts: int
    """Experts a layer."""
    replayed: tuple[Int64[np.ndarray, "_ layers topk"], ...]
    """One array a sample: the recorded routes."""
    live: tuple[Int64[np.ndarray, "_ layers topk"], ...]
    """One array a sample: the routes of the drifted router, for the same tokens."""

    def evidence(
        self,
        *,
        seed: int,
        num_sampled: int,
        replayed: Sequence[Int64[np.ndarray, "_ layers topk"]] | None = None,
        valid: Sequence[Bool[np.ndarray, " _"]] | None = None,
        num_padding: int = 3,
    ) -> GuardEvidence:
        """Pack the samples end to end, pad, and sample rows as a replay scope does.

        ``replayed`` puts other routes in place of the recorded ones: that is how a test misaligns them. By default
        every row but the last of each sample is valid.
        """
        lengths = [len(part) for part in self.live]
        ids = np.concatenate(list(self.replayed if replayed is None else replayed))
        if valid is None:
            valid = [np.arange(length) < length - 1 for length in lengths]
        held = np.concatenate([*valid, np.zeros(num_padding, dtype=bool)])
        filler = np.full((num_padding, *ids.shape[1:]), self.num_experts - 1)
        generator = np.random.default_rng(seed)
        candidates = np.flatnonzero(held)
        rows = generator.choice(candidates, size=min(num_sampled, len(candidates)), replace=False)
        live = np.concatenate(list(self.live))
        sample = np.repeat(np.arange(len(lengths)), lengths)
        position = np.concatenate([np.arange(length) for length in lengths])
        return GuardEvidence(
            live_ids=live[rows],
            rows=rows,
            expert_ids=np.concatenate([ids, filler]),
            valid=held,
            sample=np.concatenate([sample, np.full(num_padding, -1)]),
            position=np.concatenate([position, np.zeros(num_padding, dtype=np.int64)]),
            layers=tuple(range(1, 1 + ids.shape[1])),
        )


def synthetic_routes(
    *,
    seed: int,
    lengths: Sequence[int],
    num_layers: int,
    num_experts: int,
    topk: int,
    agreement: float = 1.0,
    skew: float = 1.0,
    neighbour_overlap: float = 0.0,
    shared_prompt: int = 0,
) -> SyntheticRoutes:
    """Draw routes whose statistics are set.

    ``agreement`` is the slot overlap between recorded and live routes; ``skew`` the Zipf exponent of the
    experts' popularity (0: even use); ``neighbour_overlap`` the slot overlap of adjacent tokens, reached when it lies
    above what skew alone gives; ``shared_prompt`` the leading tokens that are the same in every sample, as in one
    group of completions.
    """
    generator = np.random.default_rng(seed)
    ranks = np.arange(1, num_experts + 1)
    popularity = np.stack([generator.permutation(-skew * np.log(ranks)) for _ in range(num_layers)])
    walk = _Walk(generator, lengths, (num_layers, num_experts), shared_prompt)
    memory = _bisect(
        lambda m: _overlap_of_neighbours(walk.logits(m) + popularity, lengths, topk),
        neighbour_overlap,
        0.0,
        1.0,
    )
    logits = walk.logits(memory) + popularity
    noise = generator.standard_normal(logits.shape)
    noise *= generator.gamma(2.0, 0.5, size=(len(logits), 1, 1))  # some tokens drift more
    recorded = _topk(logits, topk)
    drift = _bisect(
        lambda d: -_overlap(_topk(logits + d * noise, topk), recorded), -agreement, 0.0, 8.0
    )
    drifted = _topk(logits + drift * noise, topk)
    cuts = np.cumsum(lengths)[:-1]
    return SyntheticRoutes(
        num_experts=num_experts,
        replayed=tuple(np.split(recorded, cuts)),
        live=tuple(np.split(drifted, cuts)),
    )


def synthetic_trace(
    token_ids: np.ndarray,
    *,
    seed: int,
    num_layers: int = 3,
    num_experts: int = 16,
    topk: int = 4,
    first_layer: int = 0,
    policy_version: int = 0,
    valid: Bool[np.ndarray, " tokens"] | None = None,
) -> RoutingTrace:
    """Return a trace of random routes for ``token_ids``; by default only the last row is ``valid=False``."""
    generator = np.random.default_rng(seed)
    order = generator.random((len(token_ids), num_layers, num_experts)).argsort(axis=2)
    return RoutingTrace.record(
        order[..., :topk],
        token_ids=token_ids,
        valid=np.arange(len(token_ids)) < len(token_ids) - 1 if valid is None else valid,
        layers=range(first_layer, first_layer + num_layers),
        num_experts=num_experts,
        origin=Origin.single(
            engine="synthetic",
            engine_version="1",
            policy_version=policy_version,
            num_rows=len(token_ids),
        ),
    )


class _Walk:
    """Token logits that remember their predecessor's, with the randomness drawn once for every memory."""

    def __init__(
        self,
        generator: np.random.Generator,
        lengths: Sequence[int],
        shape: tuple[int, int],
        shared_prompt: int,
    ) -> None:
        self._steps = [generator.standard_normal((length, *shape)) for length in lengths]
        for step in self._steps[1:]:
            step[:shared_prompt] = self._steps[0][:shared_prompt]

    def logits(self, memory: float) -> np.ndarray:
        fresh = (1 - memory**2) ** 0.5
        parts = []
        for steps in self._steps:
            walk = steps.copy()
            for token in range(1, len(walk)):
                walk[token] = memory * walk[token - 1] + fresh * steps[token]
            parts.append(walk)
        return np.concatenate(parts)


def _topk(logits: np.ndarray, topk: int) -> Int64[np.ndarray, "tokens layers topk"]:
    return np.argsort(-logits, axis=2, kind="stable")[..., :topk]


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float((a[..., :, None] == b[..., None, :]).any(axis=3).mean())


def _overlap_of_neighbours(logits: np.ndarray, lengths: Sequence[int], topk: int) -> float:
    ids = _topk(logits, topk)
    inner = np.ones(len(ids), dtype=bool)
    inner[np.cumsum(lengths) - 1] = False
    first = np.flatnonzero(inner)
    return _overlap(ids[first], ids[first + 1])


def _bisect(measure, target: float, low: float, high: float) -> float:
    """Return the argument at which a rising ``measure`` reaches ``target``, or the nearer end."""
    if measure(low) >= target:
        return low
    for _ in range(7):
        middle = (low + high) / 2
        low, high = (middle, high) if measure(middle) < target else (low, middle)
    return (low + high) / 2
