"""Figure: the traces of a plot, what they say in words, and the same as a table."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_replay.report.page.runs import RunView
from moe_replay.report.page.thinning import Series, bins

TABLE_ROWS = 24
"""Rows of a table of a line; of longer ones, evenly spaced points are listed."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "triangle-down", "star", "cross")
"""What tells runs apart beside their colours."""

_UNSEEN = re.compile(
    "[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]"
)
"""Characters that would reorder or hide the text around them."""

Trace = dict[str, Any]
"""A trace of plotly. Colours that begin with ``@``, such as ``@run0``, are those of the theme."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of a page."""

    headings: Sequence[str]
    """One a column."""
    rows: Sequence[Sequence[str]]
    """``[rows][columns]``, as they are shown."""
    note: str = ""
    """What it omits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A figure of the page."""

    key: str
    """Its id in the page."""
    title: str
    """In a few words."""
    reading: str
    """How to read it."""
    says: str
    """Its numbers in a sentence, for those who cannot see it."""
    traces: Sequence[Trace]
    """In drawing order; empty where no run has the numbers, and ``says`` then says so."""
    layout: dict[str, Any] = field(default_factory=dict)
    """Of plotly, beside fonts, colours and margins, which the page sets."""
    height: int = 320
    """Pixels."""
    table: Table | None = None
    """The same as text."""
    note: str = ""
    """What is omitted or averaged."""
    is_wide: bool = False
    """Whether it takes a row of the page by itself where there is room for two."""


def label(text: str) -> str:
    """Return text for a label of plotly, which understands some HTML."""
    return html.escape(visible(text), quote=False)


def visible(text: str) -> str:
    r"""Return text in which characters that hide or reorder others are written as their codes.

    Examples:
        >>> visible("a\u202eb")
        'a⟨U+202E⟩b'
    """
    return _UNSEEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", str(text))


def line(run: RunView, series: Series, *, name: str = "", **options: Any) -> list[Trace]:
    """Return the traces of a line of a run: over thinned steps also a band from low to high.

    There is none where the points themselves are the lowest values.
    """
    colour = f"@run{run.number}"
    shown = label(f"{run.name} {name}".strip())
    # The ninth run has the colour and symbol of the first again.
    dash = DASHES[run.number // len(SYMBOLS) % len(DASHES)]
    style = {"color": colour, "width": 2, "dash": dash} | options.pop("line", {})
    traces: list[Trace] = []
    if series.steps_a_point > 1 and series.low != series.high:
        band = {
            "type": "scatter",
            "mode": "lines",
            "line": {"width": 0},
            "hoverinfo": "skip",
            "showlegend": False,
            "meta": {"run": run.number},
        }
        axes = {key: options[key] for key in ("xaxis", "yaxis") if key in options}
        x = list(series.steps)
        traces += [
            {**band, **axes, "x": x, "y": list(series.low)},
            {
                **band,
                **axes,
                "x": x,
                "y": list(series.high),
                "fill": "tonexty",
                "fillcolor": f"{colour}/18",
            },
        ]
    few = len(series.steps) <= 60
    traces.append(
        {
            "type": "scatter",
            "mode": "lines+markers" if few else "lines",
            "marker": {"size": 5, "symbol": SYMBOLS[run.number % len(SYMBOLS)], "color": colour},
            "name": shown,
            "x": list(series.steps),
            "y": list(series.mean),
            "line": style,
            "meta": {"run": run.number},
        }
        | options
    )
    return traces


def table_of(columns: Sequence[tuple[str, Series]], show: Any, *, first: str = "step") -> Table:
    """Return lines as a table: a row a step that some line has, evenly thinned."""
    every = sorted({step for _, series in columns for step in series.steps})
    chosen = [every[part[-1]] for part in bins(len(every), TABLE_ROWS)]
    known = [dict(zip(series.steps, series.mean, strict=True)) for _, series in columns]
    rows = [
        [str(step), *(show(values[step]) if step in values else "–" for values in known)]
        for step in chosen
    ]
    omitted = len(every) - len(chosen)
    note = f"{len(chosen)} of {len(every)} points, evenly spaced." if omitted else ""
    return Table(headings=[first, *(name for name, _ in columns)], rows=rows, note=note)


def thinning_note(every: Iterable[Series]) -> str:
    """Say how many steps share a point, where any do."""
    most = max((series.steps_a_point for series in every), default=1)
    if most == 1:
        return ""
    return (
        f"Long runs: each point is the mean of up to {most} neighbouring steps, the band reaches "
        "from their lowest to their highest value."
    )
