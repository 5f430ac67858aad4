"""Routes on their way to the rank that replays them.

They are cut where they are: the rank that sampled a sequence cuts, for every rank that trains on it, just the layers
and rows that this rank owns. Sender and receiver walk the same `RowIndex` in the same order, so the bytes need no
labels.

In: traces, row indices. Out: bytes of one rank's rows, and the slices they fill.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, Integer, UInt8

from moe_replay.errors import TraceError
from moe_replay.routing import RouteSlice, RoutingTrace, RowIndex, expert_dtype, slice_routes


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteForm:
    """What the routes of one model have in common."""

    layers: tuple[int, ...]
    """Global decoder indices of the layers."""
    num_experts: int
    """Routed experts a layer."""
    topk: int
    """Experts per token."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's ids, over all ``layers``."""
        return len(self.layers) * self.topk * expert_dtype(self.num_experts).itemsize

    @classmethod
    def of(cls, traces: Sequence[RoutingTrace]) -> RouteForm:
        """Return the form that all ``traces`` share.

        Raises:
            TraceError: when they differ, so that they cannot come from one model.
        """
        shapes = {(trace.layers, trace.num_experts, trace.topk) for trace in traces}
        if len(shapes) != 1:
            raise TraceError(
                f"traces of one microbatch differ in (layers, experts, topk): {sorted(shapes)}"
            )
        layers, num_experts, topk = shapes.pop()
        return cls(layers=layers, num_experts=num_experts, topk=topk)


class SampleRows:
    """Which of a rank's rows belong to which sequence of the microbatch, and to which of its positions."""

    def __init__(self, index: RowIndex, lengths: Sequence[int]) -> None:
        tokens = np.flatnonzero(index.is_token)
        order = np.argsort(index.rows[tokens], kind="stable")
        self._local = tokens[order]
        self._whole = index.rows[self._local]
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
        self._bounds = np.searchsorted(self._whole, self._starts)

    def of(self, number: int) -> tuple[Int64[np.ndarray, " owned"], Int64[np.ndarray, " owned"]]:
        """Return the local rows of sequence ``number`` and their positions in it, in order of position."""
        here = slice(self._bounds[number], self._bounds[number + 1])
        return self._local[here], self._whole[here] - self._starts[number]


def empty_slice(form: RouteForm, num_rows: int) -> RouteSlice:
    """Return routes of ``num_rows`` rows, none of them valid yet; a stage of dense layers has no layer in it."""
    return RouteSlice(
        expert_ids=np.zeros(
            (len(form.layers), num_rows, form.topk), dtype=expert_dtype(form.num_experts)
        ),
        valid=np.zeros(num_rows, dtype=bool),
        layers=form.layers,
        num_experts=form.num_experts,
    )


def cut_routes(
    traces: Sequence[RoutingTrace], index: RowIndex, layers: Sequence[int] | None
) -> RouteSlice:
    """Return the routes of one rank; ``layers`` is empty on a pipeline stage of dense layers, None for all.

    Raises:
        TraceError: when the traces do not have the rows of the batch, differ in their models, or lack a layer.
    """
    if layers is None or layers:
        return slice_routes(traces, index, layers=layers)
    return empty_slice(narrowed(RouteForm.of(traces), layers), len(index.rows))


def narrowed(form: RouteForm, layers: Sequence[int] | None) -> RouteForm:
    """Return ``form`` with ``layers`` alone.

    Raises:
        TraceError: when it lacks one of them.
    """
    if layers is None:
        return form
    missing = sorted(set(layers) - set(form.layers))
    if missing:
        raise TraceError(
            f"the routes hold layers {list(form.layers)}, the model also routes in {missing}; the engine's model and "
            "this one differ, or the engine numbers MoE layers only"
        )
    return RouteForm(layers=tuple(layers), num_experts=form.num_experts, topk=form.topk)


def pack_rows(
    rows: SampleRows, traces: Mapping[int, RoutingTrace], layers: Sequence[int]
) -> list[UInt8[np.ndarray, " _"]]:
    """Return what the rank of ``rows`` and ``layers`` owns of some sequences (number -> trace), for `unpack_rows`.

    For each sequence in order: its valid flags, one byte a row, then its ids, row by row.
    """
    parts = []
    for number in sorted(traces):
        _, position = rows.of(number)
        parts.append(traces[number].valid[position].view(np.uint8))
        parts.append(_rows_of(traces[number], position, tuple(layers)).reshape(-1).view(np.uint8))
    return parts


def num_packed_bytes(rows: SampleRows, numbers: Iterable[int], form: RouteForm) -> int:
    """Return how much `pack_rows` makes of the sequences ``numbers``, for a rank of ``rows`` and the layers of ``form``."""
    return sum(len(rows.of(number)[0]) * (1 + form.row_bytes) for number in numbers)


def unpack_rows(
    into: RouteSlice,
    rows: SampleRows,
    numbers: Iterable[int],
    payload: UInt8[np.ndarray, " _"],
) -> int:
    """Put what `pack_rows` sent for the sequences ``numbers`` into their rows; return the bytes read."""
    num_layers, _, topk = into.expert_ids.shape
    at = 0
    for number in sorted(numbers):
        local, _ = rows.of(number)
        count = num_layers * len(local) * topk
        into.valid[local] = payload[at : at + len(local)].view(bool)
        at += len(local)
        ids = np.frombuffer(payload, dtype=into.expert_ids.dtype, count=count, offset=at)
        by_row = ids.reshape(len(local), num_layers, topk)
        for layer in range(num_layers):
            into.expert_ids[layer, local] = by_row[:, layer]
        at += ids.nbytes
    return at


def _rows_of(
    trace: RoutingTrace, position: Int64[np.ndarray, " owned"], layers: tuple[int, ...]
) -> Integer[np.ndarray, "owned layers topk"]:
    place = [trace.layers.index(layer) for layer in layers]
    if place and place == list(range(place[0], place[0] + len(place))):
        # A slice is copied row by row, far faster than single layers.
        return trace.expert_ids[position, place[0] : place[0] + len(place)]
    return trace.expert_ids[position][:, place]
