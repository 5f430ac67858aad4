"""Sum up what a rank counted in a step, small enough to be gathered by all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moe_replay.routing.guard.counts import PLACES, OverlapCounts
from moe_replay.routing.guard.statistics import MIN_WINDOW, window_rows, window_sums
from moe_replay.routing.guard.table import BIN_RANGE, NUM_BINS, NUM_STRETCHES, StepPart

if TYPE_CHECKING:
    from jaxtyping import Bool, Float64, Int64

_ALIKE = 0.1  # of the expected variance, below which rows are alike
_MIN_EFFECT_ROWS = 8  # of a sample, for its variance to mean anything


def summarise(counts: Sequence[OverlapCounts]) -> StepPart | None:
    """Sum up the counts of this rank; None without rows. All counts are of the same layers."""
    held = [part for part in counts if len(part.own)]
    if not held:
        return None
    first = held[0]
    assert all(part.layers == first.layers for part in held), "one rank counts the same layers"
    sample_ids = np.concatenate([part.sample_ids for part in held])
    order = np.argsort(sample_ids, kind="stable")
    assert (np.diff(sample_ids[order]) > 0).all(), (
        "a rank holds the rows of a sample in one microbatch"
    )

    def joined(values: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(values, axis=-1)[..., order]

    return StepPart(
        layers=first.layers,
        topk=first.topk,
        num_experts=first.num_experts,
        sample_ids=sample_ids[order],
        num_rows=joined([part.num_rows for part in held]).astype(np.int32),
        own=joined([part.layer_own.T for part in held]).T.astype(np.float32),
        chance=joined([_chance_by_layer(part).T for part in held]).T.astype(np.float32),
        alike=np.sum([rows_are_alike(part).sum(axis=0) for part in held], axis=0).astype(np.int32),
        flips=np.sum([part.layer_flips.sum(axis=0) for part in held], axis=0).astype(np.float32),
        rows_with_flip=sum(int((part.flips > 0).sum()) for part in held),
        nearer=joined([part.layer_nearer.sum(axis=2) for part in held]),
        farther=joined([part.layer_farther.sum(axis=2) for part in held]),
        layer_nearer=np.sum([part.layer_nearer.sum(axis=1) for part in held], axis=0),
        layer_farther=np.sum([part.layer_farther.sum(axis=1) for part in held], axis=0),
        stretches=np.sum([_stretches(part) for part in held], axis=0),
        effects=joined([_effects(part) for part in held]).astype(np.float32),
        window_information=np.sum([_window_information(part) for part in held], axis=0),
        repeats=joined([_count_repeats(part) for part in held]).astype(np.int32),
    )


def row_chance(counts: OverlapCounts) -> Float64[np.ndarray, " rows"]:
    """Return the slots that each row shares with the average other row of its sample."""
    others = np.maximum(counts.num_rows - 1, 1)
    return counts.others / np.repeat(others, counts.num_rows)


def rows_are_alike(counts: OverlapCounts) -> Bool[np.ndarray, "samples layers"]:
    """Return where all rows of a sample share equally many slots: repetitive text with a flip.

    Rows that differ have a variance of about ``topk * p * (1 - p)``. Example: 100 rows that each
    share 1 of 2 slots have a variance of 0, where 0.5 is expected.
    """
    rows = np.maximum(counts.num_rows, 2)[:, None]
    mean = counts.layer_own / rows
    variance = (counts.layer_own_squares - rows * mean**2) / (rows - 1)
    due = mean * (1 - mean / counts.topk)
    return (variance < _ALIKE * due) & (counts.layer_own > 0)


def _chance_by_layer(counts: OverlapCounts) -> Float64[np.ndarray, "samples layers"]:
    return counts.layer_others / np.maximum(counts.num_rows - 1, 1)[:, None]


def _effects(counts: OverlapCounts) -> Float64[np.ndarray, "signs 2 samples"]:
    """Return the variance of rows within a sample, relative to independent slots.

    Example: rows that share 8, 8, 0, 0 of 8 slots have a variance of 21.3, where independent slots
    at 1/2 have 2: about 11 slots act as one.
    """
    rows = np.maximum(counts.num_rows, 2)
    p = counts.layer_own / rows[:, None] / counts.topk
    independent = (p * (1 - p)).sum(axis=1) * counts.topk
    found = np.empty((1 + len(PLACES), 2, len(rows)))
    found[0] = _over(counts, counts.own, counts.layer_own, counts.layer_own_squares, independent)
    for place in range(len(PLACES)):
        nearer, farther = counts.layer_nearer[place], counts.layer_farther[place]
        found[1 + place] = _over(
            counts,
            counts.nearer[place].astype(np.int64) - counts.farther[place],
            nearer - farther,
            counts.layer_gain_squares[place],
            (nearer + farther).sum(axis=1) / rows,
        )
    return np.where(counts.num_rows >= _MIN_EFFECT_ROWS, found, np.nan)


def _over(
    counts: OverlapCounts,
    values: np.ndarray,
    layer_sums: Int64[np.ndarray, "samples layers"],
    layer_squares: Int64[np.ndarray, "samples layers"],
    independent: Float64[np.ndarray, " samples"],
) -> Float64[np.ndarray, "2 samples"]:
    rows = np.maximum(counts.num_rows, 2).astype(np.float64)
    values = values.astype(np.float64)
    sums = np.add.reduceat(values, counts.starts)
    together = np.add.reduceat(values**2, counts.starts) - sums**2 / rows
    single = (layer_squares - layer_sums.astype(np.float64) ** 2 / rows[:, None]).sum(axis=1)
    return np.stack([together, single]) / (rows - 1) / np.maximum(independent, 1e-9)


def _stretches(counts: OverlapCounts) -> Float64[np.ndarray, "quantities stretches"]:
    """Sum by sixteenths of samples. Example: row 30 of 40 is in sixteenth 30 * 16 // 40 = 12."""
    index = np.arange(len(counts.own)) - np.repeat(counts.starts, counts.num_rows)
    stretch = index * NUM_STRETCHES // np.repeat(counts.num_rows, counts.num_rows)
    slots = np.full(len(index), counts.topk * len(counts.layers))
    values = [slots, counts.own, row_chance(counts), *counts.nearer, *counts.farther]
    return np.stack([np.bincount(stretch, value, NUM_STRETCHES) for value in values])


def _window_information(counts: OverlapCounts) -> Int64[np.ndarray, " bins"]:
    first, end, _ = window_rows(counts.num_rows)
    short = end - first == MIN_WINDOW
    first, end = first[short], end[short]
    chance = window_sums(row_chance(counts), first, end)
    own = window_sums(counts.own.astype(np.float64), first, end)
    room = MIN_WINDOW * counts.topk * len(counts.layers) - chance
    kept = (own - chance) / np.maximum(room, 1e-9)
    return np.histogram(np.clip(kept, *BIN_RANGE), bins=NUM_BINS, range=BIN_RANGE)[0]


def _count_repeats(counts: OverlapCounts) -> Int64[np.ndarray, "2 samples"]:
    again = counts.repeats & np.roll(counts.repeats, 1)  # the first row of a sample never repeats
    return np.add.reduceat(
        np.stack([counts.repeats, again]).astype(np.int64), counts.starts, axis=1
    )
