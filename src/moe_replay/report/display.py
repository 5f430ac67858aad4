"""The terminal: a start-up summary, a line a step, live progress on a screen, a closing table.

For logs, and for screens of 40 characters or more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moe_replay.engines.types import RolloutProgress
from moe_replay.grpo.records import (
    BaseReporter,
    CompletionRecord,
    EvalRecord,
    RunSummary,
    StepRecord,
)
from moe_replay.report.columns import (
    DASH,
    HEADER_EVERY,
    WINDOW,
    Column,
    duration,
    fitting_columns,
    number,
    percent,
    shown,
    steps_of,
    tiny,
)
from moe_replay.report.progress import EVERY_S, Ticker, progress_line
from moe_replay.report.run_directory import RunDirectory
from moe_replay.report.summary import print_line, print_summary

_SAMPLING = ("rollout", "eval")
"""Stations in which an engine samples."""


LEFT_EVERY_S = 60.0
"""Seconds between the lines of a log that say how long the run will take."""


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
        self._columns: list[Column] = []
        self._has_seconds = True
        self._steps: list[StepRecord] = []
        self._last_warnings: tuple[str, ...] = ()
        self._evaluations: list[EvalRecord] = []
        self._first_step = self._max_steps = 1
        self._station: tuple[int, str, float] | None = None
        self._ends: list[float] = []
        self._said_left_at = 0.0
        self._lines = 0
        self._live: Live | None = None
        self._has_started = False
        self._ticker: Ticker | None = None
        self._ask: Callable[[], RolloutProgress] = RolloutProgress
        self._whose = ""

    def follow(self, progress: Callable[[], RolloutProgress], *, whose: str) -> None:
        """Show what ``progress`` returns while completions are sampled."""
        self._ask, self._whose = progress, f" of {whose}" if whose else ""

    def start(self, summary: RunSummary) -> None:
        """Print what is about to run, and begin the live display."""
        self._has_started = True
        self._first_step, self._max_steps = summary.first_step, summary.max_steps
        self._ends = [self._clock()]
        self._said_left_at = self._ends[0]
        missing: tuple[int, ...] = ()
        if self._run_directory is not None:
            self._steps = self._run_directory.read_steps()
            self._evaluations = self._run_directory.read_evaluations()
            missing = self._run_directory.missing_steps
        sections = {heading: list(lines) for heading, lines in summary.sections.items()}
        if summary.first_step > summary.max_steps:
            sections["Resumed"] = [
                f"all {summary.max_steps} steps are already done: there is nothing left to train"
            ]
        elif summary.first_step > 1:
            sections["Resumed"] = [f"at step {summary.first_step} of {summary.max_steps}"]
        if missing:
            few = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            sections["Resumed"].append(
                f"metrics.jsonl has no line for {steps_of(len(missing))}: {few}"
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
        """Show which station runs; before the start, which part of the run is loading."""
        self._stop_ticking()
        self._station = (step, name, self._clock())
        if not self._has_started:
            self._print(f"{name} ...")
        elif name in _SAMPLING and self._live is None:
            self._ticker = Ticker(self.tick, every_s=EVERY_S)

    def tick(self) -> None:
        """Print the progress of the running rollout or evaluation."""
        progress = self._sampling(self._clock())
        if progress and self._station is not None:
            self._print(f"{self._station[1]} of step {self._station[0]}{self._whose}: {progress}")

    def step(self, record: StepRecord, completions: Sequence[CompletionRecord]) -> None:
        """Print the line of a step."""
        self._stop_ticking()
        self._steps.append(record)
        self._ends.append(self._clock())
        before = self._columns, self._has_seconds
        self._columns, self._has_seconds = fitting_columns(
            self._console.width,
            step_width=self._step_width,
            is_terminal=self._console.is_terminal,
        )
        if before != (self._columns, self._has_seconds):
            self._lines = 0
        if self._lines % HEADER_EVERY == 0:
            self._print(self._heading_line(), style="bold")
        self._lines += 1
        self._print(self._step_line(record))
        self._say_left(record)
        for warning in record.warnings:
            if warning not in self._last_warnings:
                self._print(f"warning: {warning}", style="yellow")
        self._last_warnings = record.warnings

    def _say_left(self, record: StepRecord) -> None:
        """In a log, print now and then when the run will end; a screen shows it all the time."""
        now = self._ends[-1]
        is_due = now - self._said_left_at >= LEFT_EVERY_S
        if self._console.is_terminal or not is_due or record.step == self._max_steps:
            return
        self._said_left_at = now
        elapsed = duration(now - self._ends[0])
        self._print(
            f"step {record.step}/{self._max_steps}: {elapsed} elapsed, about {self._remaining(now)} left"
        )

    def evaluation(self, record: EvalRecord, completions: Sequence[CompletionRecord]) -> None:
        """Print the line of an evaluation."""
        self._stop_ticking()
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
        self._stop_ticking()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _stop_ticking(self) -> None:
        if self._ticker is not None:
            self._ticker.stop()
            self._ticker = None

    def _sampling(self, now: float) -> str:
        """Return the sampling progress of the running station; empty if there is none."""
        progress = self._ask()
        if self._station is None or self._station[1] not in _SAMPLING or not progress.num_total:
            return ""
        length = None
        if self._steps and self._station[1] == "rollout":
            length = self._steps[-1].metrics.get("completions/mean_length")
        return progress_line(progress, now - self._station[2], expected_length=length)

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
        seconds = f" {'seconds':>8}" if self._has_seconds else ""
        return f"{'step':>{self._step_width}}{names}{seconds}"

    def _step_line(self, record: StepRecord) -> str:
        cells = []
        for column in self._columns:
            value = record.metrics.get(column.metric) if column.metric else self._average()
            cells.append(f" {DASH if value is None else column.show(value):>{column.width}}")
        step = f"{record.step}/{self._max_steps}"
        seconds = f" {sum(record.seconds.values()):>8.2f}" if self._has_seconds else ""
        return f"{step:>{self._step_width}}{''.join(cells)}{seconds}"

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
        step = Text(f"step {self._first_step - 1 + done}/{self._max_steps}", style="bold")
        times = f"{duration(now - self._ends[0])} elapsed, {self._remaining(now)} left"
        room = self._console.width - len(step) - len(times) - 2
        bar = Table.grid(padding=(0, 1))
        if room >= 10:
            bar.add_row(step, ProgressBar(total=total, completed=done, width=room), Text(times))
        else:
            bar.add_row(Text.assemble(step, f"  {times}"))
        lines = [bar, self._station_line(now), self._last_line()]
        sampling = self._sampling(now)
        if sampling:
            lines.insert(2, Text(f"{sampling}{self._whose}"))
        return Group(*lines)

    def _remaining(self, now: float) -> str:
        recent = self._ends[-WINDOW - 1 :]
        if len(recent) < 2:
            return "?"
        pace = (recent[-1] - recent[0]) / (len(recent) - 1)
        left = self._max_steps - self._first_step + 2 - len(self._ends)
        return duration(max(0.0, left * pace - (now - recent[-1])))

    def _station_line(self, now: float) -> Text:
        """Show the seconds of each station of the last step, and the running station."""
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
        parts = [f"avg reward {shown(self._average(), number)}"]
        for name, metric, show in (
            ("k3", "rollout_correction/k3_kl", tiny),
            ("coverage", "replay/coverage", percent),
            ("agree", "replay/agreement", percent),
        ):
            parts.append(f"{name} {shown(metrics.get(metric), show)}")
        worst = shown(metrics.get("replay/agreement_min_layer"), percent)
        return Text(f"{'  '.join(parts)} (worst {worst})")
