"""Results of the reproduction: a JSON line a row, and the tables of its page that are made of them.

In: rows, estimates. Out: experiments/results/*.jsonl, tables in docs/reproduction.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from moe_replay.diagnose.statistics import Estimate
from moe_replay.routing import RoutingTrace, flipped

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "reproduction.md"

Row = Mapping[str, object]


def read_rows(name: str, results: Path = RESULTS) -> dict[str, dict[str, object]]:
    """Return the rows of a results file by their ``row``, none if the file is missing."""
    path = results / f"{name}.jsonl"
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["row"]: row for row in rows}


def keep_row(name: str, row: Row, results: Path = RESULTS) -> None:
    """Add a row to a results file; one of the same name is replaced."""
    rows = read_rows(name, results) | {str(row["row"]): dict(row)}
    path = results / f"{name}.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows.values()))


def numbers(estimate: Estimate) -> list[float | None]:
    """Return value and interval as JSON holds them, to four digits; None for what is not known."""
    return [rounded(each) for each in (estimate.value, estimate.low, estimate.high)]


def rounded(value: float) -> float | None:
    """Return a figure to four digits; None where it is not a number."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def flips_of(traces: Iterable[tuple[RoutingTrace, RoutingTrace]]) -> dict[str, int]:
    """Return how many (token, layer) pairs of recordings of the same tokens run other experts."""
    flips = pairs = 0
    for one, other in traces:
        differ, held = flipped(one, other)
        flips += int(differ[held].sum())
        pairs += int(held.sum()) * len(one.layers)
    return {"flips": flips, "pairs": pairs}


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def scientific(value: Sequence[float | None]) -> str:
    """Return a figure with its interval, as 1.2e-3 [0.9e-3, 1.5e-3]."""
    return _with_interval(
        value, lambda each: f"{each:.1e}".replace("e-0", "e-").replace("e+00", "")
    )


def percent(value: Sequence[float | None], *, num_tokens: int | None = None) -> str:
    """Return a share with its interval; where nothing was seen, the bound 3/n of ``num_tokens``."""
    if value[0] == 0 and num_tokens:
        return f"none, < {300 / num_tokens:.2g} %"
    return _with_interval(value, lambda each: f"{100 * each:#.3g}".rstrip(".")) + " %"


def plain(value: Sequence[float | None]) -> str:
    """Return a ratio with its interval."""
    return _with_interval(value, lambda each: f"{each:.2f}")


def _with_interval(value: Sequence[float | None], shown: Callable[[float], str]) -> str:
    middle, low, high = value
    if middle is None:
        return "–"
    if low is None or high is None:
        return shown(middle)
    return f"{shown(middle)} [{shown(low)}, {shown(high)}]"


def filled(page: str, name: str, text: str) -> str:
    """Return the page with ``text`` between the marks of a table.

    Raises:
        ValueError: when the page has no such marks.
    """
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    if page.count(start) != 1 or page.count(end) != 1:
        raise ValueError(
            f"docs/reproduction.md: expected {start.strip()!r} and {end.strip()!r} once each"
        )
    before, rest = page.split(start)
    return before + start + "\n" + text + "\n" + end + rest.split(end)[1]


def fill_page(tables: Mapping[str, str]) -> None:
    """Write tables into the page, by the names of their marks."""
    page = PAGE.read_text()
    for name, text in tables.items():
        page = filled(page, name, text)
    PAGE.write_text(page)
