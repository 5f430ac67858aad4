"""The table of all metrics: name, unit, exact definition, and whose it is where names differ.

The rows are in ``metrics.toml`` beside this file; `page` makes docs/metrics.md of them, which
``scripts/metrics`` writes. A metric that a run writes and the table lacks fails
``tests/grpo/test_documented.py``.
"""

from __future__ import annotations

import re
import tomllib
from functools import cache
from importlib.resources import files
from typing import NamedTuple


class Metric(NamedTuple):
    """A row of the table."""

    name: str
    """As it stands in ``metrics.jsonl`` or ``eval.jsonl``; ``<...>`` stands for many names."""
    unit: str
    """What one unit of it counts; ``1`` for a number without a unit, ``0 to 1`` for a fraction."""
    text: str
    """Its exact definition, over all ranks of a step unless it says otherwise."""
    note: str = ""
    """Whose name and definition it is, and what others mean by the name."""


class MetricGroup(NamedTuple):
    """A part of the page."""

    heading: str
    text: str
    """What is true of all its rows; may be empty."""
    rows: tuple[Metric, ...]


FORMS = {
    "<function>": ".+",
    "<name>": ".+",
    "<address>": ".+",
    "<reason>": "[a-z_]+",
    "<kind>": "[a-z_]+",
    "<station>": "[a-z_]+",
    "<phase>": "rollout|update",
    "<n>": "[0-9]+",
    "<tau>": "[0-9.]+",
}
"""Part of a name that stands for many -> regular expression of what it stands for."""
SAME_ELSEWHERE = {"live_gap/": "rollout_correction/"}
"""Prefix whose metrics are defined as those of another prefix."""

_HEAD = """# Metrics

`metrics.jsonl` has a line a step, and `logging.sinks` get the same numbers. Each is over all ranks
of the step: sums and counts are gathered before anything is divided, so that neither ranks nor
microbatches change a mean. The last column says whose name and definition it is where others use
the name for something else. `scripts/metrics` writes this page from
`src/moe_replay/report/metrics.toml`.
"""

_OF_A_SET = re.compile("eval/(?!rewards/)[^/]+/(.+)")


@cache
def metric_groups() -> tuple[MetricGroup, ...]:
    """Return the table, group by group."""
    source = files("moe_replay.report").joinpath("metrics.toml").read_text(encoding="utf-8")
    return tuple(
        MetricGroup(group["heading"], group["text"], tuple(Metric(*row) for row in group["rows"]))
        for group in tomllib.loads(source)["group"]
    )


def metric_of(name: str) -> Metric | None:
    """Return the row of a metric that a run writes; None where the table has none.

    Examples:
        >>> metric_of("rewards/my_function/std").unit
        'score'
    """
    for prefix, other in SAME_ELSEWHERE.items():
        if name.startswith(prefix):
            name = other + name.removeprefix(prefix)
    if (named := _OF_A_SET.fullmatch(name)) and metric_of(f"eval/{named[1]}"):
        name = f"eval/{named[1]}"
    rows = (row for group in metric_groups() for row in group.rows)
    return next((row for row in rows if _pattern(row.name).fullmatch(name)), None)


def page() -> str:
    """Return docs/metrics.md."""
    lines = [_HEAD]
    for heading, text, rows in metric_groups():
        lines += [f"## {heading}\n", *([f"{text}\n"] if text else [])]
        lines += ["| metric | unit | definition | whose |", "|---|---|---|---|"]
        for row in rows:
            cells = (f"`{row.name}`", row.unit, row.text, row.note)
            lines.append("|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _pattern(name: str) -> re.Pattern[str]:
    text = re.escape(name)
    for form, pattern in FORMS.items():
        text = text.replace(re.escape(form), f"(?:{pattern})")
    return re.compile(text)
