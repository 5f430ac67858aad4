"""`moe-replay rollout` in this process, whose errors are raised."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from moe_replay.cli.options import read_options
from moe_replay.cli.rollout import run_rollout


def roll_out(
    recipe: Path, folder: Path, overrides: Iterable[tuple[str, str]] = (), **options: int
) -> int:
    """Sample into a folder and return the exit code; ``num_prompts=8`` is ``--num-prompts 8``."""
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    words += [f"--{key}={value}" for key, value in overrides]
    return run_rollout(read_options(["rollout", str(recipe), "--output", str(folder), *words]))
