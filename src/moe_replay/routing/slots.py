"""Planes of expert slots: a chunk of routes transposed, so that its sets are sorted at once.

Sorting the last axis of ``[rows, layers, topk]`` costs one small sort a set. Transposed to ``topk``
planes, plane ``j`` holding slot ``j`` of every (row, layer), the same sorting network runs over all
sets at once, in vector instructions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Bool, UInt

CHUNK_SLOTS = 1 << 19
"""Expert slots handled at a time: few enough for a cache, enough to hide the cost of a call."""
_WIDEST_NETWORK = 64  # slots; beyond it a network has more steps than numpy's sort takes time


def chunk_rows(num_layers: int, topk: int) -> int:
    """Return the rows of a chunk of at most `CHUNK_SLOTS` expert slots, and at least one row."""
    return max(1, CHUNK_SLOTS // max(1, num_layers * topk))


def row_chunks(num_rows: int, num_layers: int, topk: int) -> Iterator[slice]:
    """Yield the slices that cut ``num_rows`` rows into chunks of `chunk_rows`."""
    step = chunk_rows(num_layers, topk)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def to_planes(expert_ids: UInt[np.ndarray, "rows layers topk"]) -> UInt[np.ndarray, "topk sets"]:
    """Return a copy whose plane ``j`` holds slot ``j`` of every (row, layer) pair."""
    return expert_ids.reshape(-1, expert_ids.shape[2]).T.copy(order="C")


def from_planes(
    planes: UInt[np.ndarray, "topk sets"], out: UInt[np.ndarray, "rows layers topk"]
) -> None:
    """Write the planes of all sets to their slots in ``out``."""
    slots = out.reshape(-1, len(planes))
    for slot, plane in enumerate(planes):  # twice as fast as one transposed assignment
        slots[:, slot] = plane


def sort_planes(planes: UInt[np.ndarray, "topk sets"]) -> Sequence[UInt[np.ndarray, " sets"]]:
    """Return the planes of the same sets in increasing order. The content of ``planes`` is lost.

    Examples:
        >>> [plane.tolist() for plane in sort_planes(np.array([[7, 1], [2, 9]], dtype=np.uint8))]
        [[2, 1], [7, 9]]
    """
    if len(planes) > _WIDEST_NETWORK:
        return list(np.sort(planes, axis=0))
    ordered, spare = list(planes), np.empty_like(planes[0])
    for low, high in _network(len(planes)):
        np.minimum(ordered[low], ordered[high], out=spare)
        np.maximum(ordered[low], ordered[high], out=ordered[high])
        ordered[low], spare = spare, ordered[low]
    return ordered


def repeating_sets(
    expert_ids: UInt[np.ndarray, "rows layers topk"],
) -> Bool[np.ndarray, "rows layers"]:
    """Return True at the sets that name an expert more than once."""
    repeats = np.zeros(expert_ids.shape[:2], dtype=bool)
    # The first row is enough to see that routes did not come from the codec.
    if _all_increasing(expert_ids[:1]) and _all_increasing(expert_ids):
        return repeats
    ordered = sort_planes(to_planes(expert_ids))
    flat = repeats.reshape(-1)
    for below, above in pairwise(ordered):
        flat |= below == above
    return repeats


def _all_increasing(expert_ids: UInt[np.ndarray, "rows layers topk"]) -> bool:
    """Whether every set is increasing, as the codec returns it; five times as fast as sorting."""
    slots = expert_ids.reshape(-1)
    not_above = slots[1:] <= slots[:-1]
    between_sets = not_above[expert_ids.shape[2] - 1 :: expert_ids.shape[2]]
    return bool(np.count_nonzero(not_above) == np.count_nonzero(between_sets))


@cache
def _network(width: int) -> tuple[tuple[int, int], ...]:
    """Return the comparators of Batcher's odd-even merge sort.

    Source: Batcher, "Sorting networks and their applications" (1968), in the iterative form of
    Knuth's algorithm 5.2.2M.
    """
    comparators = []
    merged = 1
    while merged < width:
        step = merged
        while step:
            for start in range(step % merged, width - step, 2 * step):
                for low in range(start, min(start + step, width - step)):
                    high = low + step
                    if low // (2 * merged) == high // (2 * merged):
                        comparators.append((low, high))
            step //= 2
        merged *= 2
    return tuple(comparators)
