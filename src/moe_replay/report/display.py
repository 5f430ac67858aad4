"""The terminal: a start-up summary, a line a step, live progress where there is a screen, and a closing table.

In: records. Out: text. Called by: report.reporters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moe_replay.grpo.records import CompletionRecord, EvalRecord, RunSummary, StepRecord
from moe_replay.report.base import BaseReporter
from moe_replay.report.run_directory import RunDirectory
from moe_replay.report.summary import (
    eval_change,
    live_comparison,
    metric_figures,
    seconds_per_step,
)

DASH = "-"
"""Stands for a metric that a step does not have."""

WINDOW = 10
"""Steps of the moving average, and of the pace from which the remaining time is estimated."""

HEADER_EVERY = 25
"""Lines after which the column names are repeated."""


def number(value: float) -> str:
    """Format a number of any size in at most eight characters: ``0.5123``, ``37.52``, ``1.2e-07``."""
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
    """Format a fraction: ``97.31 %``. Only a whole 1 shows as ``100 %``, and only an exact 0 as ``0 %``."""
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
    show: Callable[[float], str] = number
    """Formatter."""
    wide_only: bool = False
    """Left out where a line has fewer than 120 characters."""


COLUMNS = (
    Column(heading="reward", metric="reward", width=8),
    Column(heading=f"avg{WINDOW}", metric="", width=8),
    Column(heading="k3", metric="rollout_correction/k3_kl", width=8, show=tiny),
    Column(heading=">1.1", metric="rollout_correction/extreme_frac_tau_1.1", width=8, show=percent),
    Column(heading="coverage", metric="replay/coverage", width=8, show=percent),
    Column(heading="agree", metric="replay/agreement", width=8, show=percent),
    Column(
        heading="flipped",
        metric="replay/tokens_with_flip_frac",
        width=8,
        show=percent,
        wide_only=True,
    ),
    Column(heading="entropy", metric="entropy/mean", width=8, wide_only=True),
    Column(heading="length", metric="completions/mean_length", width=7),
    Column(heading="gradnorm", metric="grad_norm", width=8, wide_only=True),
    Column(heading="loss", metric="loss", width=8, wide_only=True),
)

TABLE_ROWS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("reward", "reward", number),
    ("engine gap, k3", "rollout_correction/k3_kl", tiny),
    ("  with live routing", "live_gap/k3_kl", tiny),
    ("tokens off by > 1.1x", "rollout_correction/extreme_frac_tau_1.1", percent),
    ("  with live routing", "live_gap/extreme_frac_tau_1.1", percent),
    ("coverage", "replay/coverage", percent),
    ("agreement", "replay/agreement", percent),
    ("  worst layer", "replay/agreement_min_layer", percent),
    ("tokens with a flip", "replay/tokens_with_flip_frac", percent),
    ("entropy", "entropy/mean", number),
    ("completion length", "completions/mean_length", number),
    ("gradient norm", "grad_norm", number),
    ("loss", "loss", number),
)


class ConsoleReporter(BaseReporter):
    """Shows the run on a terminal; without one, prints plain lines and no control codes."""

    def __init__(
        self,
        console: Console | None = None,
        *,
        run_directory: RunDirectory | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console(highlight=False)
        self._run_directory = run_directory
        self._clock = clock
        self._columns = [c for c in COLUMNS if self._console.width >= 120 or not c.wide_only]
        self._steps: list[StepRecord] = []
        self._evaluations: list[EvalRecord] = []
        self._first_step = self._max_steps = 1
        self._station: tuple[int, str, float] | None = None
        self._ends: list[float] = []
        self._lines = 0
        self._live: Live | None = None

    def start(self, summary: RunSummary) -> None:
        """Print what is about to run, and begin the live display."""
        self._first_step, self._max_steps = summary.first_step, summary.max_steps
        self._ends = [self._clock()]
        missing: tuple[int, ...] = ()
        if self._run_directory is not None:
            self._steps = self._run_directory.read_steps()
            self._evaluations = self._run_directory.read_evaluations()
            missing = self._run_directory.missing_steps
        sections = {heading: list(lines) for heading, lines in summary.sections.items()}
        if summary.first_step > summary.max_steps:
            sections["Resumed"] = [
                f"all {summary.max_steps} steps are done already: nothing is left to train"
            ]
        elif summary.first_step > 1:
            sections["Resumed"] = [f"at step {summary.first_step} of {summary.max_steps}"]
        if missing:
            shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            sections["Resumed"].append(
                f"metrics.jsonl has no line for {_steps(len(missing))}: {shown}"
            )
        self._announce(sections)
        if self._console.is_terminal:
            self._live = Live(
                get_renderable=self._progress,
                console=self._console,
                refresh_per_second=4,
                transient=True,
            )
            self._live.start()

    def station(self, step: int, name: str) -> None:
        """Show which station runs."""
        self._station = (step, name, self._clock())

    def step(self, record: StepRecord, completions: Sequence[CompletionRecord]) -> None:
        """Print the line of a step."""
        self._steps.append(record)
        self._ends.append(self._clock())
        if self._lines % HEADER_EVERY == 0:
            self._print(self._heading_line(), style="bold")
        self._lines += 1
        self._print(self._step_line(record))

    def evaluation(self, record: EvalRecord) -> None:
        """Print the line of an evaluation."""
        self._evaluations = [e for e in self._evaluations if e.step != record.step] + [record]
        figures = ", ".join(
            f"{name.removeprefix('eval/')} {int(value) if '/num_' in name else number(value)}"
            for name, value in record.metrics.items()
        )
        self._print(f"evaluation after step {record.step}: {figures} ({record.seconds:.1f} s)")

    def finish(self, message: str) -> None:
        """Print the closing table, the evaluation, the time by station, and where the files are."""
        self.close()
        print_summary(self._console, self._steps, self._evaluations)
        if self._run_directory is not None:
            self._print(f"run directory: {self._run_directory.path}")
        self._print(message)

    def close(self) -> None:
        """End the live display."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _announce(self, sections: Mapping[str, Sequence[str]]) -> None:
        if not self._console.is_terminal:
            for heading, lines in sections.items():
                self._print(f"{heading}:")
                for line in lines:
                    self._print(f"  {line}")
            return
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column()
        for heading, lines in sections.items():
            grid.add_row(heading, Text("\n".join(lines)))
        self._console.print(Panel(grid, title="moe-replay", title_align="left", box=box.ROUNDED))

    def _print(self, line: str, *, style: str = "") -> None:
        print_line(self._console, line, style=style)

    def _heading_line(self) -> str:
        names = "".join(f" {column.heading:>{column.width}}" for column in self._columns)
        return f"{'step':>{self._step_width}}{names} {'seconds':>8}"

    def _step_line(self, record: StepRecord) -> str:
        cells = []
        for column in self._columns:
            value = record.metrics.get(column.metric) if column.metric else self._average()
            cells.append(f" {DASH if value is None else column.show(value):>{column.width}}")
        place = f"{record.step}/{self._max_steps}"
        return f"{place:>{self._step_width}}{''.join(cells)} {sum(record.seconds.values()):>8.2f}"

    @property
    def _step_width(self) -> int:
        return max(4, 2 * len(str(self._max_steps)) + 1)

    def _average(self) -> float | None:
        rewards = [r.metrics["reward"] for r in self._steps[-WINDOW:] if "reward" in r.metrics]
        return sum(rewards) / len(rewards) if rewards else None

    def _progress(self) -> RenderableType:
        done = len(self._ends) - 1
        total = self._max_steps - self._first_step + 1
        now = self._clock()
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            Text(f"step {self._first_step - 1 + done}/{self._max_steps}", style="bold"),
            ProgressBar(total=total, completed=done, width=max(10, self._console.width - 50)),
            Text(f"{_duration(now - self._ends[0])} elapsed, {self._remaining(now)} left"),
        )
        return Group(bar, self._station_line(now), self._last_line())

    def _remaining(self, now: float) -> str:
        recent = self._ends[-WINDOW - 1 :]
        if len(recent) < 2:
            return "?"
        pace = (recent[-1] - recent[0]) / (len(recent) - 1)
        left = self._max_steps - self._first_step + 2 - len(self._ends)
        return _duration(max(0.0, left * pace - (now - recent[-1])))

    def _station_line(self, now: float) -> Text:
        """Show the seconds of each station of the last step, and the one that is running."""
        seconds = dict(self._steps[-1].seconds) if self._steps else {}
        running = self._station[1] if self._station else None
        if running is not None:
            seconds.setdefault(running, 0.0)
        line = Text()
        for name, spent in seconds.items():
            line.append(" > " if line else "")
            if name == running and self._station is not None:
                line.append(f"{name} {now - self._station[2]:.1f}s", style="bold reverse")
            else:
                line.append(f"{name} {spent:.1f}s", style="dim")
        return line

    def _last_line(self) -> Text:
        if not self._steps:
            return Text("no step finished yet", style="dim")
        metrics = self._steps[-1].metrics
        parts = [f"avg reward {_show(self._average(), number)}"]
        for name, metric, show in (
            ("k3", "rollout_correction/k3_kl", tiny),
            ("coverage", "replay/coverage", percent),
            ("agree", "replay/agreement", percent),
        ):
            parts.append(f"{name} {_show(metrics.get(metric), show)}")
        worst = _show(metrics.get("replay/agreement_min_layer"), percent)
        return Text(f"{'  '.join(parts)} (worst {worst})")


def print_line(console: Console, line: str, *, style: str = "") -> None:
    """Print one line as it is; it is wrapped at words on a screen and never in a log."""
    console.print(Text(line, style=style), soft_wrap=not console.is_terminal)


def print_summary(
    console: Console, steps: Sequence[StepRecord], evaluations: Sequence[EvalRecord]
) -> None:
    """Print how a run went: metrics from first to last step, evaluation, replay against live routing, time."""
    if steps:
        console.print(_metric_table(steps))
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
            f"engine gap (k3) over {_steps(comparison.num_steps)} that measured both: {tiny(live)} with live routing, "
            f"{tiny(replay)} with replay{factor}",
        )
    seconds = seconds_per_step(steps)
    total = sum(seconds.values())
    if total:
        shares = ", ".join(
            f"{name} {spent:.2f} ({100 * spent / total:.0f} %)" for name, spent in seconds.items()
        )
        print_line(console, f"seconds a step: {total:.2f} = {shares}")


def _metric_table(steps: Sequence[StepRecord]) -> Table:
    span = f"steps {steps[0].step} to {steps[-1].step}"
    table = Table(title=span, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column("")
    for heading in ("first 10 %", "last 10 %", "mean", "min", "max"):
        table.add_column(heading, justify="right", no_wrap=True)
    for label, metric, show in TABLE_ROWS:
        figures = metric_figures(steps, metric)
        if figures is not None:
            values = (figures.first, figures.last, figures.mean, figures.minimum, figures.maximum)
            table.add_row(label, *(show(value) for value in values))
    return table


def _show(value: float | None, show: Callable[[float], str]) -> str:
    return DASH if value is None else show(value)


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
