"""Progress of a rollout: the line, the estimate, and the timer for logs."""

from __future__ import annotations

import io
import threading

import pytest
from rich.console import Console

from moe_replay.engines.fake import FakeEngine
from moe_replay.engines.types import RolloutProgress
from moe_replay.report.progress import Ticker, progress_line, seconds_left, showing_progress

HALF = RolloutProgress(num_finished=2, num_total=8, num_tokens=4000)


class Halfway(FakeEngine):
    progress = HALF


def test_d9_a_line_says_finished_total_tokens_pace_and_end():
    # 4000 tokens in 20 s; 8 completions of 1000 tokens take another 20 s.
    assert progress_line(HALF, 20.0, expected_length=1000.0) == (
        "2/8 completions, 4,000 tokens, 200 tokens/s, about 0:00:20 left"
    )


@pytest.mark.parametrize(
    ("finished", "tokens", "length", "left"),
    [
        (0, 0, None, None),
        (0, 100, None, None),
        # No length is expected: a quarter of the completions took 20 s.
        (2, 4000, None, 60.0),
        # Longer than expected: the share of finished completions is all that is left to go by.
        (2, 9000, 1000.0, 60.0),
        (0, 2000, 1000.0, 60.0),
        (8, 9000, 1000.0, 0.0),
    ],
)
def test_d9_the_end_is_estimated_from_what_is_known(finished, tokens, length, left):
    progress = RolloutProgress(num_finished=finished, num_total=8, num_tokens=tokens)
    assert seconds_left(progress, 20.0, expected_length=length) == left


def test_d9_nothing_known_is_said_as_such():
    assert progress_line(RolloutProgress(num_total=8), 3.0) == "0/8 completions, ? left"


def test_a_ticker_calls_until_it_is_stopped():
    calls = []
    enough = threading.Event()

    def call() -> None:
        calls.append(1)
        if len(calls) >= 3:
            enough.set()

    ticker = Ticker(call, every_s=0.001)
    assert enough.wait(300)
    ticker.stop()
    ticker.stop()
    count = len(calls)
    assert not ticker._thread.is_alive()
    assert len(calls) == count


@pytest.mark.parametrize("is_terminal", [False, True])
def test_d9_a_command_shows_what_its_engine_says(is_terminal):
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=100, highlight=False)
    seen = threading.Event()
    write = console.file.write

    def noted(text: str) -> int:
        if "/20 completions" in text:
            seen.set()
        return write(text)

    console.file.write = noted  # type: ignore[method-assign]
    with showing_progress(console, Halfway(), num_total=20, done=lambda: (8, 1000), every_s=0.001):
        assert seen.wait(300)
    assert "10/20 completions, 5,000 tokens" in console.file.getvalue()
    assert ("\x1b[" in console.file.getvalue()) == is_terminal


def test_an_engine_that_says_nothing_is_not_asked():
    console = Console(file=io.StringIO())
    with showing_progress(console, FakeEngine(), num_total=1, done=lambda: (0, 0), every_s=0.001):
        pass
    assert console.file.getvalue() == ""
