"""Time two ways of doing one thing side by side, so that other load on the machine cancels.

In: two functions. Out: the ratio of their times.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Contest:
    """What a contest found."""

    first_s: float
    """Mean seconds of the first way."""
    second_s: float
    """Mean seconds of the second way."""
    ratio: float
    """Median of second / first over the pairs."""
    low: float
    """A quarter of the pairs lies below."""
    high: float
    """A quarter of the pairs lies above."""

    def describe(self, first: str, second: str) -> str:
        """Return the contest in a line."""
        return (
            f"{first} {self.first_s:.3f} s, {second} {self.second_s:.3f} s; {second} / {first} {self.ratio:.3f}, half of "
            f"the pairs between {self.low:.3f} and {self.high:.3f}"
        )


def alternate(
    first: Callable[[], None],
    second: Callable[[], None],
    *,
    pairs: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Contest:
    """Run both once unmeasured, then in ``pairs`` (2 or more) whose order alternates.

    ``time.process_time`` as ``clock`` counts what this process computes and no wait for a core.
    """
    first()
    second()
    took: tuple[list[float], list[float]] = ([], [])
    for number in range(pairs):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            took[which].append(_seconds((first, second)[which], clock))
    ratios = [b / a for a, b in zip(*took, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Contest(
        first_s=statistics.fmean(took[0]),
        second_s=statistics.fmean(took[1]),
        ratio=middle,
        low=low,
        high=high,
    )


def _seconds(run: Callable[[], None], clock: Callable[[], float]) -> float:
    _finish_device()
    started = clock()
    run()
    _finish_device()
    return clock() - started


def _finish_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
