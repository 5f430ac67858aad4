"""RouteSlice: the routes that one rank replays, its layers and rows, cut straight from the traces.

The routes of a global batch are tens of gigabytes when every rank is sent all of them, or when they
are widened first. A rank holds the layers of its pipeline stage times the rows of its context and
sequence shard, as wide as a trace's. The layer comes first, so a slice is uploaded at once and each
router reads one contiguous block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from moe_replay.errors import TraceError
from moe_replay.routing.form import RouteForm, expert_dtype
from moe_replay.routing.rows import RowIndex
from moe_replay.routing.trace import RoutingTrace

if TYPE_CHECKING:
    from jaxtyping import Bool, Int64, Integer

# Rows turned from token-major to layer-major at a time: what they touch stays in the cache.
_ROWS_AT_ONCE = 512


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RouteSlice:
    """Routes of one rank in the order in which its routers see the rows."""

    expert_ids: Integer[np.ndarray, "layers rows topk"]
    """``[layers, rows, topk]``, uint8 or uint16, contiguous; not read where ``valid`` is False."""
    valid: Bool[np.ndarray, " rows"]
    """``[rows]``; False at padding and where the trace has no route."""
    layers: tuple[int, ...]
    """Global decoder index of each entry of the layer dim."""
    num_experts: int
    """Routed experts a layer of the model that recorded the routes."""

    @property
    def nbytes(self) -> int:
        """Bytes that the routes occupy."""
        return self.expert_ids.nbytes + self.valid.nbytes


def slice_routes(
    traces: Sequence[RoutingTrace], index: RowIndex, *, layers: Sequence[int] | None = None
) -> RouteSlice:
    """Return the routes of the rows of ``index`` in ``layers`` (global indices; None for all).

    ``traces`` are those of the batch that ``index`` was made for, in its order. Nothing of the
    batch's size is made on the way: with 4 stages, 4 CP and 2 SP ranks, a rank's slice is 1/32 of
    the batch. ``layers`` may be empty, on a stage of dense layers: then only ``valid`` says
    anything.

    Worked example: traces of 3 and 2 tokens in the layers 1 to 4, a rank of the layers 2 and 4.

        index.rows           1  2  3 -1        row 3 of the batch is row 0 of the second trace
        copied as            trace 0, rows 1:3 -> rows 0:2   trace 1, rows 0:1 -> row 2
        of layers            entry 1 -> entry 0              entry 3 -> entry 1
        valid                v1 v2 v0  F       row 3 of the slice is padding, and stays zero

    Raises:
        TraceError: when the traces do not have the rows of the batch, differ in their models, or
            lack a layer.
    """
    form = RouteForm.common((trace.form for trace in traces), "a batch")
    total = sum(len(trace) for trace in traces)
    if total != index.num_rows:
        raise TraceError(
            f"{len(traces)} traces have {total} rows, the batch of the row index has {index.num_rows}; a sample was left "
            "out, or index and traces are of different batches"
        )
    wanted = form.layers if layers is None else tuple(layers)
    blocks = _layer_blocks(wanted, form.layers)
    dtype = expert_dtype(form.num_experts)
    ids = np.zeros((len(wanted), len(index.rows), form.topk), dtype=dtype)
    valid = np.zeros(len(index.rows), dtype=bool)
    into = as_sets(ids)
    views = [as_sets(_contiguous_sets(trace)) for trace in traces]
    for place, number, start, count in _runs(index.rows, [len(trace) for trace in traces]):
        valid[place : place + count] = traces[number].valid[start : start + count]
        for at in range(0, count, _ROWS_AT_ONCE):
            rows = min(_ROWS_AT_ONCE, count - at)
            here = slice(place + at, place + at + rows)
            there = slice(start + at, start + at + rows)
            for to, taken in blocks:
                into[to, here] = views[number][there, taken].T
    return RouteSlice(expert_ids=ids, valid=valid, layers=wanted, num_experts=form.num_experts)


def as_sets(ids: Integer[np.ndarray, "... topk"]) -> np.ndarray:
    """Return a view with one element for each set of ``topk`` ids: numpy then moves sets.

    Ids of shape ``[3, 5, 8]``, one byte each, become ``[3, 5]`` numbers of 8 bytes.
    """
    size = ids.shape[-1] * ids.itemsize
    dtype = np.dtype(f"u{size}" if size in (1, 2, 4, 8) else (np.void, size))
    return ids.view(dtype)[..., 0]


def _runs(
    rows: Int64[np.ndarray, " local_rows"], lengths: Sequence[int]
) -> Iterator[tuple[int, int, int, int]]:
    """Yield (first local row, trace, first row of the trace, rows) for each stretch of one trace.

    Worked example: ``rows = [4 5 6 -1 0 1]`` and traces of 5 and 2 rows. Rows 4 to 6 follow one
    another, but row 5 belongs to the second trace, so there are three stretches: ``(0, 0, 4, 1)``,
    ``(1, 1, 0, 2)`` and, after the padding, ``(4, 0, 0, 2)``.
    """
    starts = np.cumsum([0, *lengths])
    begins = np.diff(rows, prepend=-3) != 1
    begins |= rows == 0  # padding is -1, so row 0 behind it looks like its continuation
    at = np.flatnonzero(begins)
    counts = np.diff(np.append(at, len(rows)))
    held = rows[at] >= 0
    at, counts = at[held], counts[held]
    numbers = np.searchsorted(starts, rows[at], side="right") - 1
    for place, count, number in zip(at.tolist(), counts.tolist(), numbers.tolist(), strict=True):
        row, stop = int(rows[place]), int(rows[place]) + count
        while row < stop:
            until = min(stop, int(starts[number + 1]))
            yield place, number, row - int(starts[number]), until - row
            place, row, number = place + until - row, until, number + 1


def _layer_blocks(wanted: tuple[int, ...], held: tuple[int, ...]) -> list[tuple[slice, slice]]:
    """Return (entries of the slice, of the traces) for each stretch of layers together in both.

    Layers 2, 3 and 7 of traces that hold 1, 2, 3, 5 and 7 are ``0:2`` from ``1:3``, and ``2:3``
    from ``4:5``: two copies instead of three.
    """
    missing = sorted(set(wanted) - set(held))
    if missing:
        raise TraceError(
            f"layers {list(wanted)} were asked for, the traces hold {list(held)}, without {missing}; the recording model "
            "numbers its layers differently, or dense layers were asked for"
        )
    if not wanted:
        return []
    if any(b <= a for a, b in pairwise(wanted)):
        raise TraceError(f"layers {list(wanted)} were asked for, expected increasing indices")
    at = np.searchsorted(held, wanted)
    cuts = [0, *(np.flatnonzero(np.diff(at) != 1) + 1).tolist(), len(at)]
    return [(slice(a, b), slice(int(at[a]), int(at[b - 1]) + 1)) for a, b in pairwise(cuts)]


def _contiguous_sets(trace: RoutingTrace) -> Integer[np.ndarray, "tokens layers topk"]:
    ids = trace.expert_ids
    return ids if ids.strides[2] == ids.itemsize else np.ascontiguousarray(ids)
