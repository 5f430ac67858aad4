"""Write the page: figures, tables and samples of the runs in one file that loads nothing."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
import plotly.offline

from moe_replay.report.metric_table import metric_of
from moe_replay.report.page.cost import memory_figure, stations_figure
from moe_replay.report.page.figure import Figure, Table, label, visible
from moe_replay.report.page.learning import (
    gap_figure,
    held_out_figure,
    reward_figure,
    tail_figure,
    tail_over_steps_figure,
)
from moe_replay.report.page.routing import (
    agreement_figure,
    coverage_figure,
    flip_figures,
    live_rows_figure,
)
from moe_replay.report.page.runs import RunView
from moe_replay.report.page.samples import shown_samples
from moe_replay.report.page.thinning import series_of
from moe_replay.report.page.verdict import verdict_of

_MARKS = {"good": "✓", "plain": "–", "warning": "!", "bad": "✕"}
"""What tells verdicts apart beside their colours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Section:
    """A part of the page under one heading."""

    key: str
    title: str
    figures: Sequence[Figure]


def page_of(runs: Sequence[RunView], *, written_at: datetime) -> str:
    """Return the page of one or more runs.

    Its policy for content allows its own scripts, by their digests, and nothing from elsewhere: a
    completion that holds HTML stays text.
    """
    sections = _sections(runs)
    figures = [figure for section in sections for figure in section.figures]
    shown = [shown_samples(run) for run in runs]
    scripts = [plotly.offline.get_plotlyjs(), _own("figures.js"), _own("samples.js")]
    facts = {
        "runs": [{"name": run.name, "label": label(run.name)} for run in runs],
        "figures": {
            figure.key: {
                "traces": figure.traces,
                "layout": figure.layout,
                "height": figure.height,
            }
            for figure in figures
            if figure.traces
        },
        "samples": [part.samples for part in shown],
        "metrics": _metrics(runs),
    }
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["plain"] = visible
    template = environment.from_string(_own("page.html.j2"))
    return template.render(
        title=visible(", ".join(run.name for run in runs)),
        policy=_policy(scripts),
        style=_own("page.css"),
        scripts=scripts,
        facts=embedded(facts),
        runs=[(run, verdict_of(run)) for run in runs],
        marks=_MARKS,
        sections=sections,
        shown_dropped={
            run.number
            for run, part in zip(runs, shown, strict=True)
            if any(sample["dropped"] for sample in part.samples)
        },
        sample_notes=[(run, part) for run, part in zip(runs, shown, strict=True)],
        differences=differing_keys(runs),
        written_at=written_at.strftime("%Y-%m-%d %H:%M"),
    )


def embedded(facts: Any) -> str:
    r"""Return JSON that can stand in a script element, whatever texts it holds.

    Examples:
        >>> embedded({"text": "</script>"})
        '{"text":"\\u003c/script\\u003e"}'
    """
    text = json.dumps(facts, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def differing_keys(runs: Sequence[RunView]) -> Table | None:
    """Return the recipe keys and versions in which runs differ; None for a single run."""
    if len(runs) < 2:
        return None
    rows = []
    for held, skipped in (
        ([run.recipe for run in runs], {"run.output_dir"}),
        ([run.versions for run in runs], {"executable"}),
    ):
        keys = sorted({key for each in held for key in each} - skipped)
        for key in keys:
            values = [json.dumps(each[key], default=str) if key in each else "–" for each in held]
            if len(set(values)) > 1:
                rows.append([key, *values])
    return Table(headings=["key", *(run.name for run in runs)], rows=rows)


def _sections(runs: Sequence[RunView]) -> list[_Section]:
    return [
        _Section(
            key="learning",
            title="Reward and accuracy",
            figures=[reward_figure(runs), held_out_figure(runs)],
        ),
        _Section(
            key="gaps",
            title="Engine gap against policy drift",
            figures=[gap_figure(runs), tail_figure(runs), tail_over_steps_figure(runs)],
        ),
        _Section(
            key="replay",
            title="Replay",
            figures=[
                agreement_figure(runs),
                *flip_figures(runs),
                coverage_figure(runs),
                live_rows_figure(runs),
            ],
        ),
        _Section(
            key="cost",
            title="Time and memory",
            figures=[stations_figure(runs), memory_figure(runs)],
        ),
    ]


def _metrics(runs: Sequence[RunView]) -> list[dict[str, Any]]:
    """Return every metric of every run as a line, with its definition."""
    names = sorted({name for run in runs for record in run.steps for name in record.metrics})
    found = []
    for name in names:
        row = metric_of(name)
        lines = []
        for run in runs:
            series = series_of(run.steps, name)
            lines.append(None if series is None else {"x": series.steps, "y": series.mean})
        found.append(
            {
                "name": name,
                "unit": "" if row is None else row.unit,
                "text": "" if row is None else row.text,
                "lines": lines,
            }
        )
    return found


def _policy(scripts: Sequence[str]) -> str:
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


@cache
def _own(name: str) -> str:
    return files("moe_replay.report.page").joinpath(name).read_text(encoding="utf-8")
