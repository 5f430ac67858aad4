"""The progress of a running rollout: a line of text, and a timer that prints it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.text import Text

from moe_replay.engines.types import Engine, RolloutProgress, ShowsProgress
from moe_replay.report.columns import duration

EVERY_S = 30.0
"""Seconds between progress lines in a log."""


def progress_line(
    progress: RolloutProgress, seconds: float, *, expected_length: float | None = None
) -> str:
    """Return the progress, pace and estimated remaining time of a rollout.

    ``expected_length`` is the expected mean length of completions, such as that of the last step;
    without it the estimate uses the fraction of finished completions.

    Examples:
        >>> progress = RolloutProgress(num_finished=5, num_total=20, num_tokens=1500)
        >>> progress_line(progress, 10.0)
        '5/20 completions, 1,500 tokens, 150 tokens/s, about 0:00:30 left'
    """
    parts = [f"{progress.num_finished:,}/{progress.num_total:,} completions"]
    if progress.num_tokens and seconds > 0:
        parts += [
            f"{progress.num_tokens:,} tokens",
            f"{progress.num_tokens / seconds:,.0f} tokens/s",
        ]
    left = seconds_left(progress, seconds, expected_length=expected_length)
    return ", ".join([*parts, "? left" if left is None else f"about {duration(left)} left"])


def seconds_left(
    progress: RolloutProgress, seconds: float, *, expected_length: float | None
) -> float | None:
    """Return the estimated remaining seconds of a rollout; None without data to estimate from."""
    if progress.num_finished == progress.num_total:
        return 0.0
    wanted = progress.num_total * (expected_length or 0.0)
    if 0 < progress.num_tokens < wanted:
        return seconds * (wanted - progress.num_tokens) / progress.num_tokens
    if progress.num_finished:
        return seconds * (progress.num_total - progress.num_finished) / progress.num_finished
    return None


class Ticker:
    """Calls a function periodically in its own thread, until it is stopped."""

    def __init__(self, call: Callable[[], None], *, every_s: float) -> None:
        self._call, self._every_s = call, every_s
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="moe-replay progress", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; may be called twice."""
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_over.wait(self._every_s):
            self._call()


@contextmanager
def showing_progress(
    console: Console,
    engine: Engine,
    *,
    num_total: int,
    done: Callable[[], tuple[int, int]],
    every_s: float = EVERY_S,
) -> Iterator[None]:
    """Show the progress of the calls of ``engine``, live on a screen and periodically in a log.

    ``done`` returns the completions and tokens of finished calls.
    """
    if not isinstance(engine, ShowsProgress):
        yield
        return
    started = time.monotonic()

    def line() -> str:
        now, (finished, tokens) = engine.progress, done()
        progress = RolloutProgress(
            num_finished=min(num_total, finished + now.num_finished),
            num_total=num_total,
            num_tokens=tokens + now.num_tokens,
        )
        return progress_line(progress, time.monotonic() - started)

    if console.is_terminal:
        with Live(
            get_renderable=lambda: Text(line()),
            console=console,
            refresh_per_second=4,
            transient=True,
        ):
            yield
        return
    ticker = Ticker(lambda: console.print(line(), soft_wrap=True), every_s=every_s)
    try:
        yield
    finally:
        ticker.stop()
