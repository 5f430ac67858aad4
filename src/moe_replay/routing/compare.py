"""Comparison of two recordings of the same tokens: how often, where and for which tokens the routers differ.

A *flip* is a (token, layer) whose expert sets differ. Fractions are over pairs of rows that both traces hold.

In: pairs of traces. Out: TraceComparison. Called by: cli, report, grpo metrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moe_replay.errors import TokenMismatchError, TraceError
from moe_replay.routing.digest import first_difference
from moe_replay.routing.trace import RoutingTrace

if TYPE_CHECKING:
    from jaxtyping import Bool, Float64, Int64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TraceComparison:
    """Flips and slot overlap between two recordings of some sequences."""

    layers: tuple[int, ...]
    """Global decoder indices."""
    num_tokens: int
    """Rows compared, over all sequences: those that both recordings hold."""
    num_skipped: int
    """Rows that at least one recording does not hold."""
    flip_frac: float
    """Share of (token, layer) pairs whose expert sets differ; nan without tokens, like every mean here."""
    flip_frac_by_layer: Float64[np.ndarray, " layers"]
    """``[layers]``."""
    flip_frac_by_position: Float64[np.ndarray, " positions"]
    """``[positions]``, over all layers and sequences; nan where no sequence has a compared row."""
    num_tokens_by_position: Int64[np.ndarray, " positions"]
    """``[positions]``, rows behind each entry of ``flip_frac_by_position``."""
    flip_frac_by_sequence: Float64[np.ndarray, " sequences"]
    """``[sequences]``, in the order of the pairs; nan for a sequence without a compared row."""
    slot_overlap: float
    """Mean share of the topk slots that both chose."""
    slot_overlap_by_layer: Float64[np.ndarray, " layers"]
    """``[layers]``."""
    tokens_with_flip_frac: float
    """Share of tokens with a flip in at least one layer."""
    tokens_with_flip_if_independent_frac: float
    """What that share would be if layers flipped independently: ``1 - prod(1 - flip_frac_by_layer)``. A smaller
    measured share means that flips gather on few tokens."""
    mean_flips_per_token: float
    """Layers that flip, per token."""


def compare_traces(pairs: Sequence[tuple[RoutingTrace, RoutingTrace]]) -> TraceComparison:
    """Compare two recordings of each of several sequences.

    Raises:
        TokenMismatchError: when the two traces of a pair are bound to different tokens.
        TraceError: when there is no pair, or layers, experts or topk differ.
    """
    if not pairs:
        raise TraceError("no traces to compare")
    first = pairs[0][0]
    for number, pair in enumerate(pairs):
        _check_pair(number, pair, first)
    both = [a.valid & b.valid for a, b in pairs]
    shared = np.concatenate(
        [_shared_slots(a, b, held) for (a, b), held in zip(pairs, both, strict=True)]
    )
    lengths = [len(held) for held in both]
    kept = np.concatenate(both)
    position = np.concatenate([np.arange(length) for length in lengths])[kept]
    sequence = np.repeat(np.arange(len(pairs)), lengths)[kept]
    flips = shared < first.topk
    per_token = flips.sum(axis=1)
    by_layer = _mean(flips)
    by_position, tokens_at = _grouped_mean(flips, position, max(lengths))
    by_sequence, _ = _grouped_mean(flips, sequence, len(pairs))
    overlap = _mean(shared) / first.topk
    return TraceComparison(
        layers=first.layers,
        num_tokens=len(flips),
        num_skipped=int(len(kept) - len(flips)),
        flip_frac=float(by_layer.mean()),
        flip_frac_by_layer=by_layer,
        flip_frac_by_position=by_position,
        num_tokens_by_position=tokens_at,
        flip_frac_by_sequence=by_sequence,
        slot_overlap=float(overlap.mean()),
        slot_overlap_by_layer=overlap,
        tokens_with_flip_frac=float(_mean((per_token > 0)[:, None])[0]),
        tokens_with_flip_if_independent_frac=float(1 - np.prod(1 - by_layer)),
        mean_flips_per_token=float(_mean(per_token[:, None])[0]),
    )


def flipped(
    ours: RoutingTrace, theirs: RoutingTrace
) -> tuple[Bool[np.ndarray, "tokens layers"], Bool[np.ndarray, " tokens"]]:
    """Return which (token, layer) pairs flip, and which tokens both hold; nothing is said about the others.

    Raises:
        TraceError: as `compare_traces`.
    """
    _check_pair(0, (ours, theirs), ours)
    held = ours.valid & theirs.valid
    flips = np.zeros((len(ours), len(ours.layers)), dtype=bool)
    flips[held] = _shared_slots(ours, theirs, held) < ours.topk
    return flips, held


def _shared_slots(
    ours: RoutingTrace, theirs: RoutingTrace, held: Bool[np.ndarray, " tokens"]
) -> Int64[np.ndarray, "held layers"]:
    """Count the experts in common; both sets have ``topk`` distinct members, so equal sets share ``topk``."""
    together = np.concatenate([ours.expert_ids[held], theirs.expert_ids[held]], axis=2)
    together.sort(axis=2)
    return (together[..., 1:] == together[..., :-1]).sum(axis=2)


def _mean(values: np.ndarray) -> Float64[np.ndarray, " columns"]:
    if not len(values):
        return np.full(values.shape[1], np.nan)
    return values.mean(axis=0, dtype=np.float64)


def _grouped_mean(
    flips: Bool[np.ndarray, "tokens layers"], group: Int64[np.ndarray, " tokens"], num_groups: int
) -> tuple[Float64[np.ndarray, " groups"], Int64[np.ndarray, " groups"]]:
    count = np.bincount(group, minlength=num_groups)
    total = np.bincount(group, weights=flips.mean(axis=1), minlength=num_groups)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan), count


def _check_pair(number: int, pair: tuple[RoutingTrace, RoutingTrace], first: RoutingTrace) -> None:
    wanted = (first.layers, first.num_experts, first.topk)
    for side, trace in zip(("first", "second"), pair, strict=True):
        got = (trace.layers, trace.num_experts, trace.topk)
        if got != wanted:
            raise TraceError(
                f"sequence {number}, {side} trace: (layers, experts, topk) are {got}, expected {wanted}; recordings of "
                "one model compare, after select_layers when one of them holds more layers"
            )
    ours, theirs = pair
    if len(ours) != len(theirs):
        raise TokenMismatchError(
            f"sequence {number}: traces of {len(ours)} and {len(theirs)} tokens; crop both to the same tokens"
        )
    row = first_difference(ours.token_digest, theirs.token_digest)
    if row is not None:
        raise TokenMismatchError(
            f"sequence {number}: the traces are bound to different tokens from row {row} of {len(ours)} on; they record "
            "other samples, or one of them is shifted"
        )
