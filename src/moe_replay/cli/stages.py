"""What a command says while it loads, so that nobody looks at an empty screen.

In: what begins. Out: a line on standard error, at once.
"""

from __future__ import annotations

import os
import sys
import time

START_AGAIN = 75
"""Exit code of what was stopped, or lost what it needs, and works when it is started again (EX_TEMPFAIL of sysexits.h)."""


def say(text: str) -> None:
    """Print a line at once; ranks other than the first are silent."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


class Progress:
    """Says every few seconds how far long work has come, and nothing about work that is short."""

    def __init__(self, *, every_s: float = 3.0) -> None:
        self._every_s = every_s
        self._last = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Take note of progress; ``what`` is being done."""
        now = time.monotonic()
        if now - self._last >= self._every_s:
            self._last = now
            say(f"{what}: {done:,} of {total:,}")


def quiet_transformers() -> None:
    """Keep the progress bars of transformers out of logs and of our own display."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
