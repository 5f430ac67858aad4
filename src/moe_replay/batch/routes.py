"""Routes on their way to the rank that replays them.

The rank that sampled a sequence cuts, for every rank that trains on it, just the layers and rows
that this rank owns. Sender and receiver derive the same rows from the same `RowIndex`, so the bytes
need no labels.

In: traces, row indices. Out: the bytes of one rank's rows, and the slices that they fill.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from jaxtyping import Int64, UInt8

from moe_replay.routing import (
    RouteForm,
    RouteSlice,
    RoutingTrace,
    RowIndex,
    expert_dtype,
    slice_routes,
)
from moe_replay.routing.slices import as_sets


def row_bytes(form: RouteForm) -> int:
    """Return the bytes that one token takes: its valid flag, and its ids over all layers."""
    return 1 + len(form.layers) * form.topk * expert_dtype(form.num_experts).itemsize


def empty_slice(form: RouteForm, num_rows: int) -> RouteSlice:
    """Return routes of ``num_rows`` rows, none valid yet; a stage of dense layers has no layer."""
    return RouteSlice(
        expert_ids=np.zeros(
            (len(form.layers), num_rows, form.topk), dtype=expert_dtype(form.num_experts)
        ),
        valid=np.zeros(num_rows, dtype=bool),
        layers=form.layers,
        num_experts=form.num_experts,
    )


def rows_of(
    index: RowIndex, lengths: Sequence[int], numbers: Collection[int]
) -> tuple[Int64[np.ndarray, " owned"], RowIndex]:
    """Return the local rows of the sequences ``numbers``, and where they lie in those alone.

    Worked example: sequences of 3, 2 and 2 tokens, of which 0 and 2 are asked for.

        index.rows         0  2  3  5  6 -1
        sequence           0  0  1  2  2  -
        local rows         0  1     3  4
        their own index    0  2     3  4       (sequence 2 starts at row 5 of all, at row 3 of two)
    """
    whole = np.array(lengths, dtype=np.int64)
    starts = np.append(0, np.cumsum(whole))
    owner = np.searchsorted(starts, index.rows, side="right") - 1
    # Padding is row -1, so its owner is -1: the last entry, which stays False.
    is_asked = np.zeros(len(lengths) + 1, dtype=bool)
    is_asked[list(numbers)] = True
    sizes = np.where(is_asked[:-1], whole, 0)
    moved_by = starts[:-1] - (np.cumsum(sizes) - sizes)
    local = np.flatnonzero(is_asked[owner])
    rows = index.rows[local]
    own = RowIndex(
        rows=rows - moved_by[owner[local]],
        num_rows=int(sizes.sum()),
        padded_lengths=tuple(sizes.tolist()),
    )
    return local, own


def cut_routes(
    traces: Mapping[int, RoutingTrace],
    index: RowIndex,
    lengths: Sequence[int],
    layers: Sequence[int],
) -> list[UInt8[np.ndarray, " _"]]:
    """Return what the rank of ``index`` and ``layers`` needs of some sequences (number -> trace).

    The bytes are the valid flags of its rows, one byte each, then the ids layer by layer. Two rows
    of two layers of top-2 give ``[v0 v1 | a0 a0 a1 a1 | b0 b0 b1 b1]``.
    """
    _, own = rows_of(index, lengths, traces)
    cut = slice_routes([traces[number] for number in sorted(traces)], own, layers=layers)
    return [cut.valid.view(np.uint8), cut.expert_ids.reshape(-1).view(np.uint8)]


def fill_routes(
    into: RouteSlice, local: Int64[np.ndarray, " owned"], payload: UInt8[np.ndarray, " _"]
) -> None:
    """Write what `cut_routes` returned for the rows ``local`` into them."""
    num_layers, _, topk = into.expert_ids.shape
    into.valid[local] = payload[: len(local)].view(bool)
    ids = payload[len(local) :].view(into.expert_ids.dtype)
    as_sets(into.expert_ids)[:, local] = as_sets(ids.reshape(num_layers, len(local), topk))
