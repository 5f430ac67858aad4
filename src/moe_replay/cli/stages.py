"""What a command says while it loads, so that nobody looks at an empty screen.

In: what begins. Out: a line on standard error, at once.
"""

from __future__ import annotations

import os
import sys


def say(text: str) -> None:
    """Print a line at once; ranks other than the first are silent."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def quiet_transformers() -> None:
    """Keep the progress bars of transformers out of logs and of our own display."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
