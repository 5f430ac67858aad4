"""Compares two recordings of the same tokens: how often, where and for which tokens they differ.

A *flip* is a (token, layer) whose expert sets differ; each layer has one router, so flips by layer
are flips by router. Fractions are over pairs of rows that both traces hold.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from moe_replay.errors import TokenMismatchError, TraceError
from moe_replay.routing.digest import first_difference, recover_tokens
from moe_replay.routing.form import RouteForm
from moe_replay.routing.slots import row_chunks, sort_planes, to_planes
from moe_replay.routing.trace import RoutingTrace

if TYPE_CHECKING:
    from jaxtyping import Bool, Float64, Int64, UInt16


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
    """Share of (token, layer) pairs whose expert sets differ; nan without tokens, as all means."""
    flip_frac_by_layer: Float64[np.ndarray, " layers"]
    """``[layers]``."""
    flip_frac_by_position: Float64[np.ndarray, " positions"]
    """``[positions]``, over all layers and sequences; nan where no sequence has a compared row."""
    num_tokens_by_position: Int64[np.ndarray, " positions"]
    """``[positions]``, rows behind each entry of ``flip_frac_by_position``."""
    flip_frac_by_sequence: Float64[np.ndarray, " sequences"]
    """``[sequences]``, in the order of the pairs; nan for a sequence without a compared row."""
    token_ids: Int64[np.ndarray, " different_tokens"]
    """``[different_tokens]``, the token ids of the compared rows, each once, increasing."""
    flip_frac_by_token_id: Float64[np.ndarray, " different_tokens"]
    """``[different_tokens]``, over all layers and all rows of that token id."""
    num_tokens_by_token_id: Int64[np.ndarray, " different_tokens"]
    """``[different_tokens]``, rows behind each entry of ``flip_frac_by_token_id``."""
    slot_overlap: float
    """Mean share of the topk slots that both chose."""
    slot_overlap_by_layer: Float64[np.ndarray, " layers"]
    """``[layers]``."""
    tokens_with_flip_frac: float
    """Share of tokens with a flip in at least one layer."""
    tokens_with_flip_if_independent_frac: float
    """That share if layers flipped independently: ``1 - prod(1 - flip_frac_by_layer)``. A smaller
    measured share means that flips gather on few tokens."""
    mean_flips_per_token: float
    """Layers that flip, per token."""
    num_tokens_by_flips: Int64[np.ndarray, " flips"]
    """``[layers + 1]``, entry ``n`` counts the tokens of which exactly ``n`` layers flip."""


def compare_traces(pairs: Iterable[tuple[RoutingTrace, RoutingTrace]]) -> TraceComparison:
    """Compare two recordings of each of several sequences; one pair at a time is held.

    Raises:
        TokenMismatchError: when the two traces of a pair are bound to different tokens.
        TraceError: when there are no pairs, or layers, experts or topk differ.
    """
    tally: _Tally | None = None
    for number, pair in enumerate(pairs):
        if tally is None:
            tally = _Tally(pair[0].form)
        _check_pair(number, pair, tally.form)
        tally.add(*pair)
    if tally is None:
        raise TraceError("no traces to compare")
    return tally.comparison()


class _Tally:
    """Sums over the pairs seen so far, in memory of the order of tokens, not of routes."""

    def __init__(self, form: RouteForm) -> None:
        self.form = form
        self.num_flips = np.zeros(len(form.layers), dtype=np.int64)
        self.num_shared = np.zeros(len(form.layers), dtype=np.int64)
        self.num_skipped = 0
        self.longest = 0
        self.flips: list[Int64[np.ndarray, " held"]] = []
        self.positions: list[Int64[np.ndarray, " held"]] = []
        self.tokens: list[Int64[np.ndarray, " held"]] = []

    def add(self, ours: RoutingTrace, theirs: RoutingTrace) -> None:
        held = ours.valid & theirs.valid
        flips_per_row = []
        for rows in row_chunks(len(ours), len(ours.layers), 2 * ours.topk):
            shared = _shared_slots(ours, theirs, rows, held[rows])
            flips = shared < ours.topk
            self.num_shared += shared.sum(axis=0, dtype=np.int64)
            self.num_flips += flips.sum(axis=0)
            flips_per_row.append(flips.sum(axis=1))
        self.flips.append(np.concatenate([np.zeros(0, dtype=np.int64), *flips_per_row]))
        self.positions.append(np.flatnonzero(held))
        self.tokens.append(recover_tokens(ours.token_digest)[held].astype(np.int64))
        self.num_skipped += int(len(held) - held.sum())
        self.longest = max(self.longest, len(held))

    def comparison(self) -> TraceComparison:
        flips = np.concatenate(self.flips)
        num_tokens, num_layers = len(flips), len(self.form.layers)
        lengths = [len(part) for part in self.flips]
        by_layer = _shares(self.num_flips, num_tokens)
        overlap = _shares(self.num_shared, num_tokens * self.form.topk)
        num_tokens_by_flips = np.bincount(flips, minlength=num_layers + 1)
        by_flips = _shares(num_tokens_by_flips, num_tokens)
        different, token = np.unique(np.concatenate(self.tokens), return_inverse=True)
        by_position, tokens_at = _grouped(
            flips, np.concatenate(self.positions), self.longest, num_layers
        )
        by_sequence, _ = _grouped(
            flips, np.repeat(np.arange(len(lengths)), lengths), len(lengths), num_layers
        )
        by_token, tokens_of = _grouped(flips, token, len(different), num_layers)
        return TraceComparison(
            layers=self.form.layers,
            num_tokens=num_tokens,
            num_skipped=self.num_skipped,
            flip_frac=float(by_layer.mean()),
            flip_frac_by_layer=by_layer,
            flip_frac_by_position=by_position,
            num_tokens_by_position=tokens_at,
            flip_frac_by_sequence=by_sequence,
            token_ids=different,
            flip_frac_by_token_id=by_token,
            num_tokens_by_token_id=tokens_of,
            slot_overlap=float(overlap.mean()),
            slot_overlap_by_layer=overlap,
            tokens_with_flip_frac=float(by_flips[1:].sum()),
            tokens_with_flip_if_independent_frac=float(1 - np.prod(1 - by_layer)),
            mean_flips_per_token=float(by_flips @ np.arange(num_layers + 1)),
            num_tokens_by_flips=num_tokens_by_flips,
        )


def flipped(
    ours: RoutingTrace, theirs: RoutingTrace
) -> tuple[Bool[np.ndarray, "tokens layers"], Bool[np.ndarray, " tokens"]]:
    """Return which (token, layer) pairs flip, and which tokens both traces hold.

    Raises:
        TraceError: as `compare_traces`.
    """
    _check_pair(0, (ours, theirs), ours.form)
    held = ours.valid & theirs.valid
    flips = np.zeros((len(ours), len(ours.layers)), dtype=bool)
    for rows in row_chunks(len(ours), len(ours.layers), 2 * ours.topk):
        shared = _shared_slots(ours, theirs, rows, held[rows])
        flips[rows][held[rows]] = shared < ours.topk
    return flips, held


def _shared_slots(
    ours: RoutingTrace, theirs: RoutingTrace, rows: slice, held: Bool[np.ndarray, " rows"]
) -> UInt16[np.ndarray, "held layers"]:
    """Count the experts in common; equal sets share ``topk``."""
    together = np.concatenate([ours.expert_ids[rows][held], theirs.expert_ids[rows][held]], axis=2)
    shared = np.zeros(together.shape[:2], dtype=np.uint16)
    flat = shared.reshape(-1)
    for below, above in pairwise(sort_planes(to_planes(together))):
        flat += below == above
    return shared


def _shares(totals: Int64[np.ndarray, " entries"], count: int) -> Float64[np.ndarray, " entries"]:
    return totals / count if count else np.full(len(totals), np.nan)


def _grouped(
    flips: Int64[np.ndarray, " tokens"],
    group: Int64[np.ndarray, " tokens"],
    num_groups: int,
    num_layers: int,
) -> tuple[Float64[np.ndarray, " groups"], Int64[np.ndarray, " groups"]]:
    """Return the share of (token, layer) pairs that flip in each group, and the tokens of each."""
    count = np.bincount(group, minlength=num_groups)
    total = np.bincount(group, weights=flips, minlength=num_groups)
    return np.where(count > 0, total / np.maximum(count * num_layers, 1), np.nan), count


def _check_pair(number: int, pair: tuple[RoutingTrace, RoutingTrace], form: RouteForm) -> None:
    for side, trace in zip(("first", "second"), pair, strict=True):
        if trace.form != form:
            raise TraceError(
                f"sequence {number}, {side} trace: {trace.form}, expected {form}; recordings of one model "
                "compare, after select_layers when one of them holds more layers"
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
