"""The commit that a line of results ran at."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def commit() -> str:
    """Return the commit of the code that runs, with a plus if code was changed since."""

    def git(*words: str) -> str:
        command = ["git", *words]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return found.stdout.strip()

    code = ("src", "recipes", "examples", "experiments/*.py", "benchmarks/*.py")
    changed = git("status", "--porcelain", "--", *code)
    return git("rev-parse", "--short=7", "HEAD") + ("+" if changed else "")
