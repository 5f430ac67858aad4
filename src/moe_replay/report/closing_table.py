"""How a run went, in the words and numbers at its end, for a screen of any width.

In: step and evaluation records. Out: text.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_replay.grpo.records import EvalRecord, StepRecord
from moe_replay.report.columns import TABLE_ROWS, number, steps_of, tiny
from moe_replay.report.summary import (
    eval_change,
    live_comparison,
    metric_figures,
    seconds_per_step,
)

_HEADINGS = (
    ("first 10 %", "last 10 %", "mean", "min", "max"),
    ("first 10 %", "last 10 %", "mean"),
    ("first 10 %", "last 10 %"),
    ("last 10 %",),
)
"""Figures of the table of metrics, from wide to narrow."""


def print_line(console: Console, line: str, *, style: str = "") -> None:
    """Print one line as it is; it is wrapped at words on a screen and never in a log."""
    console.print(Text(line, style=style), soft_wrap=not console.is_terminal)


def print_summary(
    console: Console, steps: Sequence[StepRecord], evaluations: Sequence[EvalRecord]
) -> None:
    """Print how a run went: metrics from first to last step, evaluation, replay against live routing, time."""
    if steps:
        console.print(_metric_table(steps, console))
    evaluation = eval_change(evaluations)
    if evaluation is not None:
        items = "" if evaluation.num_items is None else f" ({evaluation.num_items} prompts)"
        print_line(
            console,
            f"held-out reward{items}: {number(evaluation.first)} after step {evaluation.first_step}, "
            f"{number(evaluation.last)} after step {evaluation.last_step}",
        )
    comparison = live_comparison(steps)
    if comparison is not None:
        live, replay = comparison.live_k3, comparison.replay_k3
        factor = f", {live / replay:.1f} times less" if replay > 0 else ""
        print_line(
            console,
            f"engine gap (k3) over {steps_of(comparison.num_steps)} that measured both: {tiny(live)} with live routing, "
            f"{tiny(replay)} with replay{factor}",
        )
    seconds = seconds_per_step(steps)
    total = sum(seconds.values())
    if total:
        shares = ", ".join(
            f"{name} {spent:.2f} ({100 * spent / total:.0f} %)" for name, spent in seconds.items()
        )
        print_line(console, f"seconds a step: {total:.2f} = {shares}")


def _metric_table(steps: Sequence[StepRecord], console: Console) -> Table:
    """Return the table of metrics with as many figures as the screen holds beside the names."""
    *tables, narrowest = (_table_of(steps, headings) for headings in _HEADINGS)
    for table in tables:
        wanted = console.measure(table, options=console.options.update(width=10_000)).maximum
        if wanted <= console.width:
            return table
    return narrowest


def _table_of(steps: Sequence[StepRecord], headings: Sequence[str]) -> Table:
    is_whole = headings == _HEADINGS[0]
    table = Table(
        title=f"steps {steps[0].step} to {steps[-1].step}",
        title_justify="left",
        box=box.SIMPLE_HEAD if is_whole else None,
        padding=(0, 1) if is_whole else (0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    for heading in headings:
        text = heading if is_whole else heading.replace(" ", "\n", 1)
        table.add_column(text, justify="right", no_wrap=True)
    for label, metric, show in TABLE_ROWS:
        figures = metric_figures(steps, metric)
        if figures is not None:
            values = {
                "first 10 %": figures.first,
                "last 10 %": figures.last,
                "mean": figures.mean,
                "min": figures.minimum,
                "max": figures.maximum,
            }
            table.add_row(label, *(show(values[heading]) for heading in headings))
    return table
