"""What a command prints while it loads, so that the screen is never empty."""

from __future__ import annotations

import os
import sys
import time

START_AGAIN = 75
"""Exit code that asks for a restart: the run or server was stopped, or lost something it needs
(EX_TEMPFAIL)."""


def say(text: str) -> None:
    """Print a line at once; ranks other than 0 are silent."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


class Progress:
    """Prints the progress of long work every few seconds, and nothing about short work."""

    def __init__(self, *, every_s: float = 3.0) -> None:
        self._every_s = every_s
        self._last = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Report progress; ``what`` names the work."""
        now = time.monotonic()
        if now - self._last >= self._every_s:
            self._last = now
            say(f"{what}: {done:,} of {total:,}")


def quiet_transformers() -> None:
    """Keep the progress bars of transformers out of logs and our own display."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
