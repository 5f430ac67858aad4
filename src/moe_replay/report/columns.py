"""How metrics are formatted, and which columns fit a given width."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

DASH = "-"
"""Stands for a metric that a step does not have."""

WINDOW = 10
"""Steps of the moving average, and of the pace from which the remaining time is estimated."""

HEADER_EVERY = 25
"""Number of lines after which the column names are repeated."""


def number(value: float) -> str:
    """Format any number in at most eight characters: ``0.5123``, ``37.52``, ``1.2e-07``."""
    size = abs(value)
    if value == 0:
        return "0"
    if size < 1e-3 or size >= 1e5:
        return f"{value:.1e}"
    return f"{value:.4f}" if size < 1 else f"{value:.3f}" if size < 10 else f"{value:.2f}"


def tiny(value: float) -> str:
    """Format a number whose order of magnitude matters: ``1.23e-03``."""
    return "0" if value == 0 else f"{value:.2e}"


def percent(value: float) -> str:
    """Format a fraction: ``97.31 %``; only exactly 1 is ``100 %``, and exactly 0 ``0 %``."""
    if value in (0, 1):
        return f"{value * 100:.0f} %"
    if 0 < value < 1e-4:
        return "<0.01 %"
    return f"{min(value * 100, 99.99) if value < 1 else value * 100:.2f} %"


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of the step lines."""

    heading: str
    """Name over the column."""
    metric: str
    """Metric shown; ``""`` for the computed ones."""
    width: int
    """Characters."""
    rank: int
    """Priority when a line gets narrower: 1 is kept longest."""
    show: Callable[[float], str] = number
    """Formatter."""


COLUMNS = (
    Column(heading="reward", metric="reward", width=8, rank=1),
    Column(heading=f"avg{WINDOW}", metric="", width=8, rank=5),
    Column(heading="k3", metric="rollout_correction/k3_kl", width=8, show=tiny, rank=3),
    Column(
        heading=">1.1",
        metric="rollout_correction/extreme_frac_tau_1.1",
        width=8,
        show=percent,
        rank=7,
    ),
    Column(heading="coverage", metric="replay/coverage", width=8, show=percent, rank=4),
    Column(heading="agree", metric="replay/agreement", width=8, show=percent, rank=2),
    Column(
        heading="flipped",
        metric="replay/tokens_with_flip_frac",
        width=8,
        show=percent,
        rank=8,
    ),
    Column(heading="entropy", metric="entropy/mean", width=8, rank=9),
    Column(heading="length", metric="completions/mean_length", width=7, rank=6),
    Column(heading="gradnorm", metric="grad_norm", width=8, rank=10),
    Column(heading="loss", metric="loss", width=8, rank=11),
)
NORMAL_RANK = 7
"""Columns up to this rank are in every log, and on screens of 80 characters or more."""
WIDE_WIDTH = 120
"""Line width from which all columns are shown."""
SECONDS_WIDTH = 9
"""Width of the seconds at the end of a line, with the space before them."""


def fitting_columns(width: int, *, step_width: int, is_terminal: bool) -> tuple[list[Column], bool]:
    """Return the columns that fit into a line, and whether the seconds fit; logs have at least 80.

    Examples:
        >>> columns, with_seconds = fitting_columns(40, step_width=5, is_terminal=True)
        >>> [column.heading for column in columns], with_seconds
        (['reward', 'k3', 'agree'], False)
    """
    if width >= WIDE_WIDTH:
        return list(COLUMNS), True
    ranks = [column for column in COLUMNS if column.rank <= NORMAL_RANK]
    left = max(width, 80 if not is_terminal else 0) - step_width
    chosen: set[str] = set()
    with_seconds = False
    for column in sorted(ranks, key=lambda column: column.rank):
        if column.rank == 4:
            with_seconds = left >= SECONDS_WIDTH
            left -= SECONDS_WIDTH
        if left < column.width + 1:
            break
        left -= column.width + 1
        chosen.add(column.heading)
    return [column for column in COLUMNS if column.heading in chosen], with_seconds


TABLE_ROWS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("reward", "reward", number),
    ("engine gap, k3", "rollout_correction/k3_kl", tiny),
    ("  with live routing", "live_gap/k3_kl", tiny),
    ("tokens off by > 1.1x", "rollout_correction/extreme_frac_tau_1.1", percent),
    ("  with live routing", "live_gap/extreme_frac_tau_1.1", percent),
    ("coverage", "replay/coverage", percent),
    ("agreement", "replay/agreement", percent),
    ("  worst layer", "replay/agreement_min_layer", percent),
    ("  worst sample", "replay/agreement_min_sample", percent),
    ("samples dropped", "replay/dropped_samples", number),
    ("  lost to drift", "replay/lost_samples", number),
    ("tokens with a flip", "replay/tokens_with_flip_frac", percent),
    ("entropy", "entropy/mean", number),
    ("completion length", "completions/mean_length", number),
    ("gradient norm", "grad_norm", number),
    ("loss", "loss", number),
)


def shown(value: float | None, show: Callable[[float], str]) -> str:
    """Format a value that may be missing."""
    return DASH if value is None else show(value)


def steps_of(count: int) -> str:
    """Return ``1 step`` or ``3 steps``."""
    return "1 step" if count == 1 else f"{count} steps"


def duration(seconds: float) -> str:
    """Return ``0:01:05`` for 65 seconds."""
    return str(timedelta(seconds=round(seconds)))
