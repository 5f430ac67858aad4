"""How a run went: its figures, and the closing table that shows them on a screen of any width."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

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
_REWARD_OF_A_SET = re.compile("eval/(?:(?!rewards/)([^/]+)/)?reward")


def metric_figures(steps: Sequence[StepRecord], name: str) -> dict[str, float] | None:
    """Return heading -> value of a metric over the steps that have it; None when none has it.

    10 % are at least one step.
    """
    values = [record.metrics[name] for record in steps if name in record.metrics]
    if not values:
        return None
    tenth = max(1, math.ceil(len(values) / 10))
    return {
        "first 10 %": _mean(values[:tenth]),
        "last 10 %": _mean(values[-tenth:]),
        "mean": _mean(values),
        "min": min(values),
        "max": max(values),
    }


def live_comparison(steps: Sequence[StepRecord]) -> tuple[int, float, float] | None:
    """Return how many steps measured both gaps, and the mean k3 with replay and with live routing.

    None if they never differ: without replay, and with R2 (which scores live and replays in the
    update), the live gap is the gap itself.
    """
    both = [
        (record.metrics["rollout_correction/k3_kl"], record.metrics["live_gap/k3_kl"])
        for record in steps
        if {"rollout_correction/k3_kl", "live_gap/k3_kl"} <= record.metrics.keys()
    ]
    if all(replay == live for replay, live in both):
        return None
    replays, lives = zip(*both, strict=True)
    return len(both), _mean(replays), _mean(lives)


def eval_changes(evaluations: Sequence[EvalRecord]) -> dict[str, tuple[EvalRecord, EvalRecord]]:
    """Return held-out set -> the first and the last evaluation with a reward of it."""
    known: dict[str, list[EvalRecord]] = {}
    for record in evaluations:
        for name in record.metrics:
            if found := _REWARD_OF_A_SET.fullmatch(name):
                known.setdefault(found[1] or "", []).append(record)
    return {name: (records[0], records[-1]) for name, records in known.items()}


def seconds_per_step(steps: Sequence[StepRecord]) -> dict[str, float]:
    """Return station -> mean seconds a step, in the order in which stations first ran."""
    stations = dict.fromkeys(name for record in steps for name in record.seconds)
    return {name: _mean([record.seconds.get(name, 0.0) for record in steps]) for name in stations}


def push_speed(steps: Sequence[StepRecord]) -> float | None:
    """Return the speed of the pushes of some steps in MB/s; None when none was timed.

    Pushes of 40 MB in 0.3 and 0.5 s: 100 MB/s.
    """
    num_bytes = math.fsum(record.metrics.get("sync/bytes", 0.0) for record in steps)
    seconds = math.fsum(record.seconds.get("sync", 0.0) for record in steps)
    return num_bytes / seconds / 1e6 if num_bytes and seconds else None


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
    for name, change in eval_changes(evaluations).items():
        prefix, whose = (f"eval/{name}", f" of {name}") if name else ("eval", "")
        num_items = change[1].metrics.get(f"{prefix}/num_items")
        items = "" if num_items is None else f" ({int(num_items)} prompts)"
        rewards = [f"{number(e.metrics[f'{prefix}/reward'])} after step {e.step}" for e in change]
        print_line(console, f"held-out reward{whose}{items}: {', '.join(rewards)}")
    if comparison := live_comparison(steps):
        num_steps, replay, live = comparison
        factor = f", {live / replay:.1f} times less" if replay > 0 else ""
        print_line(
            console,
            f"engine gap (k3) over {steps_of(num_steps)} that measured both: {tiny(live)} with live routing, "
            f"{tiny(replay)} with replay{factor}",
        )
    seconds = seconds_per_step(steps)
    total = sum(seconds.values())
    if total:
        shares = ", ".join(
            f"{name} {spent:.2f} ({100 * spent / total:.0f} %)" for name, spent in seconds.items()
        )
        print_line(console, f"seconds a step: {total:.2f} = {shares}")
    if (speed := push_speed(steps)) is not None:
        size = steps[-1].metrics["sync/bytes"] / 1e6
        print_line(console, f"a push: {size:,.1f} MB, {speed:,.1f} MB/s")


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
            table.add_row(label, *(show(figures[heading]) for heading in headings))
    return table
