"""How unlikely a count is, in nats: minus the natural logarithm of a bound on its probability.

Nats of independent signs add up, and 20 nats are one in 5e8. Every function bounds from above (the
true probability is smaller), so thresholds in nats keep the stated rate of false alarms.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float64, Int64, Integer, UInt64

MIX = np.uint64(0x9E3779B97F4A7C15)
"""Odd factor that mixes the bits of a key."""
MIN_WINDOW = 8
"""Rows of the shortest window; the next sizes double."""


def shortfall_nats(
    hits: float | Float64[np.ndarray, "*#any"],
    slots: float | Float64[np.ndarray, "*#any"],
    share: float | Float64[np.ndarray, "*#any"],
    effect: float | Float64[np.ndarray, "*#any"] = 1.0,
) -> Float64[np.ndarray, "*any"]:
    """Return nats of ``hits`` or fewer of ``slots``, each with probability ``share``, or else 0.

    The Chernoff bound ``slots / effect * KL(hits / slots || share)``, where ``effect`` slots act as
    one. Example: 40 of 100 slots where 80 were due are 100 * (0.4 ln(0.4/0.8) + 0.6 ln(0.6/0.2)) =
    38 nats.
    """
    p = np.clip(hits / np.maximum(slots, 1e-9), 1e-9, 1 - 1e-9)
    q = np.clip(share, 1e-6, 1 - 1e-6)
    divergence = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    return np.where((p < q) & (slots > 0), slots / effect * divergence, 0.0)


def excess_nats(
    count: Float64[np.ndarray, " any"], mean: Float64[np.ndarray, " any"], shape: float
) -> Float64[np.ndarray, " any"]:
    """Return nats of ``count`` or more in a negative binomial with ``mean``, or else 0.

    ``shape`` is that of the gamma distribution of the samples' rates: the smaller, the more samples
    differ.
    """
    x = np.maximum(count, 1e-9)
    tail = x * np.log(x * (mean + shape) / (mean * (x + shape)))
    return np.where(count > mean, tail - shape * np.log((x + shape) / (mean + shape)), 0.0)


def gap_nats(
    gaps: Float64[np.ndarray, " samples"], usual: Float64[np.ndarray, " usual"]
) -> Float64[np.ndarray, " samples"]:
    """Return how unusual each sample's mean k3 is among ``usual`` ones.

    A Pareto tail through the median and the 95th percentile of the logarithms. Its index is at most
    1: the mean of such a distribution is infinite, so a single large value is no more surprising
    than its rank.
    """
    y = np.log(gaps + 1e-12)
    middle, high = np.quantile(np.log(usual + 1e-12), [0.5, 0.95])
    scale = max((high - middle) / math.log(10), 1.0)
    return np.where(y > high, math.log(20) + (y - high) / scale, 0.0)


def window_rows(
    num_rows: Int64[np.ndarray, " samples"],
) -> tuple[
    Int64[np.ndarray, " windows"], Int64[np.ndarray, " windows"], Int64[np.ndarray, " windows"]
]:
    """Return (first row, end, sample entry) of all windows of samples stored end to end.

    Windows have 8, 16, 32, ... rows; each overlaps the last of its length by half, and one of each
    length ends with the sample. Example: 22 rows have windows 0-8, 4-12, 8-16, 12-20, 14-22 and
    0-16, 6-22. There are about ``rows / 2``.
    """
    starts = np.cumsum(num_rows) - num_rows
    first: list[np.ndarray] = []
    width: list[np.ndarray] = []
    entries: list[np.ndarray] = []
    long, rows = np.arange(len(num_rows)), MIN_WINDOW
    while len(long := long[num_rows[long] >= rows]):
        free = num_rows[long] - rows
        count = -(-free // (rows // 2)) + 1
        entry = np.repeat(long, count)
        step = np.arange(len(entry)) - np.repeat(np.cumsum(count) - count, count)
        first.append(starts[entry] + np.minimum(step * (rows // 2), num_rows[entry] - rows))
        width.append(np.full(len(entry), rows))
        entries.append(entry)
        rows *= 2
    if not first:
        return (np.zeros(0, np.int64),) * 3
    begin = np.concatenate(first)
    return begin, begin + np.concatenate(width), np.concatenate(entries)


def window_sums(
    values: Float64[np.ndarray, " rows"],
    first: Int64[np.ndarray, " windows"],
    end: Int64[np.ndarray, " windows"],
) -> Float64[np.ndarray, " windows"]:
    """Return the sums of ``values`` over the rows ``first`` to ``end`` of each window."""
    total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    return total[end] - total[first]


def row_keys(columns: Integer[np.ndarray, "rows columns"]) -> UInt64[np.ndarray, " rows"]:
    """Return one number a row, equal for rows that are equal in all columns."""
    key = np.zeros(len(columns), np.uint64)
    for column in columns.T:
        key = (key ^ (column.astype(np.uint64) + np.uint64(1))) * MIX
        key ^= key >> np.uint64(29)
    return key


def times_met(keys: UInt64[np.ndarray, " rows"]) -> Float64[np.ndarray, " rows"]:
    """Return how many rows have the key of each row. Example: keys 5, 7, 5 give 2, 1, 2."""
    _, entry, count = np.unique(keys, return_inverse=True, return_counts=True)
    return count[entry].astype(np.float64)
