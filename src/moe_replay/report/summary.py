"""How a run went: its figures, and the closing table that shows them on a screen of any width.

In: step and evaluation records. Out: figures, printed text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_replay.grpo.records import EvalRecord, StepRecord
from moe_replay.report.columns import TABLE_ROWS, number, steps_of, tiny

_HEADINGS = (
    ("first 10 %", "last 10 %", "mean", "min", "max"),
    ("first 10 %", "last 10 %", "mean"),
    ("first 10 %", "last 10 %"),
    ("last 10 %",),
)
"""Columns of the metric table, from wide to narrow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricFigures:
    """How one metric went, over the steps that have it."""

    first: float
    """Mean of the first 10 % of the steps that have it, at least one."""
    last: float
    """Mean of the last 10 %."""
    mean: float
    """Over all steps."""
    minimum: float
    """Smallest value."""
    maximum: float
    """Largest value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveComparison:
    """The engine gap with replay and with live routing, over the steps that measured both."""

    num_steps: int
    """Steps that have both."""
    replay_k3: float
    """Mean k3 with replayed routes."""
    live_k3: float
    """Mean k3 of the same samples under the same weights with live routing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalChange:
    """Held-out reward before and after."""

    first_step: int
    """Step of the first evaluation."""
    first: float
    """Its ``eval/reward``."""
    last_step: int
    """Step of the last evaluation."""
    last: float
    """Its ``eval/reward``."""
    num_items: int | None
    """Prompts evaluated; None when the records do not say."""


def metric_figures(steps: Sequence[StepRecord], name: str) -> MetricFigures | None:
    """Return how a metric went, or None when no step has it."""
    values = [record.metrics[name] for record in steps if name in record.metrics]
    if not values:
        return None
    tenth = max(1, math.ceil(len(values) / 10))
    return MetricFigures(
        first=_mean(values[:tenth]),
        last=_mean(values[-tenth:]),
        mean=_mean(values),
        minimum=min(values),
        maximum=max(values),
    )


def live_comparison(steps: Sequence[StepRecord]) -> LiveComparison | None:
    """Compare the engine gap with and without replay; None if they never differ.

    Without replay, and with R2 (which scores live and replays in the update), the live gap is the
    gap itself.
    """
    both = [
        (record.metrics["rollout_correction/k3_kl"], record.metrics["live_gap/k3_kl"])
        for record in steps
        if {"rollout_correction/k3_kl", "live_gap/k3_kl"} <= record.metrics.keys()
    ]
    if all(replay == live for replay, live in both):
        return None
    return LiveComparison(
        num_steps=len(both),
        replay_k3=_mean([replay for replay, _ in both]),
        live_k3=_mean([live for _, live in both]),
    )


def eval_change(evaluations: Sequence[EvalRecord]) -> EvalChange | None:
    """Compare the first with the last evaluation; None when there was none."""
    known = [record for record in evaluations if "eval/reward" in record.metrics]
    if not known:
        return None
    first, last = known[0], known[-1]
    num_items = last.metrics.get("eval/num_items")
    return EvalChange(
        first_step=first.step,
        first=first.metrics["eval/reward"],
        last_step=last.step,
        last=last.metrics["eval/reward"],
        num_items=None if num_items is None else int(num_items),
    )


def seconds_per_step(steps: Sequence[StepRecord]) -> dict[str, float]:
    """Return station -> mean seconds a step, in the order in which stations first ran."""
    stations = dict.fromkeys(name for record in steps for name in record.seconds)
    return {name: _mean([record.seconds.get(name, 0.0) for record in steps]) for name in stations}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def print_line(console: Console, line: str, *, style: str = "") -> None:
    """Print one line: wrapped at words on a screen, never wrapped in a log."""
    console.print(Text(line, style=style), soft_wrap=not console.is_terminal)


def print_summary(
    console: Console, steps: Sequence[StepRecord], evaluations: Sequence[EvalRecord]
) -> None:
    """Print how a run went: metrics, evaluation, replay against live routing, time."""
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
    """Return the metric table with as many columns as the screen fits."""
    *tables, narrowest = (_table_of(steps, headings) for headings in _HEADINGS)
    for table in tables:
        wanted = console.measure(table, options=console.options.update(width=10_000)).maximum
        if wanted <= console.width:
            return table
    return narrowest


def _table_of(steps: Sequence[StepRecord], headings: Sequence[str]) -> Table:
    is_full = headings == _HEADINGS[0]
    table = Table(
        title=f"steps {steps[0].step} to {steps[-1].step}",
        title_justify="left",
        box=box.SIMPLE_HEAD if is_full else None,
        padding=(0, 1) if is_full else (0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    for heading in headings:
        text = heading if is_full else heading.replace(" ", "\n", 1)
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
