"""Long runs on a page of bounded size: neighbouring steps share a point, by one rule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moe_replay.grpo.records import StepRecord

MAX_POINTS = 500
"""Points of a line."""
MAX_COLUMNS = 240
"""Columns of a heat map."""
_DIGITS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A metric over the steps that have it, at most `MAX_POINTS` points."""

    steps: tuple[int, ...]
    """Last step of each point."""
    mean: tuple[float, ...]
    """Over the steps of each point."""
    low: tuple[float, ...]
    """The smallest of them."""
    high: tuple[float, ...]
    """The largest of them."""
    steps_a_point: int
    """Neighbouring steps that share a point; 1 where none do."""


def bins(count: int, limit: int) -> list[range]:
    """Divide ``count`` neighbours into at most ``limit`` ranges of equal length, the last shorter.

    Examples:
        >>> bins(5, 2)
        [range(0, 3), range(3, 5)]
    """
    size = max(1, math.ceil(count / limit))
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def series_of(
    steps: Iterable[StepRecord], metric: str, *, limit: int = MAX_POINTS
) -> Series | None:
    """Return a metric as a line; None when no step has it."""
    held = [(record.step, record.metrics[metric]) for record in steps if metric in record.metrics]
    return thinned(held, limit=limit) if held else None


def thinned(held: Sequence[tuple[int, float]], *, limit: int = MAX_POINTS) -> Series:
    """Return ``(step, value)`` pairs, at least one, as a line."""
    parts = bins(len(held), limit)
    values = [[held[at][1] for at in part] for part in parts]
    return Series(
        steps=tuple(held[part[-1]][0] for part in parts),
        mean=tuple(rounded(math.fsum(v) / len(v)) for v in values),
        low=tuple(rounded(min(v)) for v in values),
        high=tuple(rounded(max(v)) for v in values),
        steps_a_point=len(parts[0]),
    )


def rounded(value: float) -> float:
    """Return a number with as many digits as a page needs."""
    return float(f"{value:.{_DIGITS}g}")
