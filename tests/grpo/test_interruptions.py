"""Runs that are killed, or whose disk fills up, through the command line."""

from __future__ import annotations

import contextlib
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from moe_replay.recipe.load import load_recipe

from .test_loop import run

pytestmark = pytest.mark.ranks

STEPS = 5
SEED = 7
REWARD = """
import threading
from pathlib import Path

LIMIT = Path(__file__).with_name("hangs_after")


def likes_digits(completions, trainer_state, **columns):
    while LIMIT.exists() and trainer_state.global_step >= int(LIMIT.read_text() or 0):
        threading.Event().wait(0.05)
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]
"""


def settings_of(output: Path, options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the keys of a run into ``output``."""
    settings = {"run.output_dir": output, "run.max_steps": STEPS, **options}
    return [(key, str(value)) for key, value in settings.items()]


def command(workspace: Path, output: Path, **options: Any) -> list[str]:
    """Return the command that trains into ``output``."""
    overrides = [p for key, value in settings_of(output, options) for p in (f"--{key}", value)]
    recipe = str(workspace / "recipe.toml")
    return [sys.executable, "-m", "moe_replay.cli.main", "train", recipe, *overrides]


def run_here(workspace: Path, output: Path, **options: Any) -> None:
    """Train to the end without a command of its own, whose start takes longer than its steps."""
    run(load_recipe(workspace / "recipe.toml", settings_of(output, options)))


def on_a_small_disk(
    workspace: Path, output: Path, limit_bytes: int, **options: Any
) -> tuple[int, str]:
    """Train where no file may be larger; return the exit code and what was printed, in one line."""
    limits = limit_bytes, resource.RLIM_INFINITY
    done = subprocess.run(
        command(workspace, output, **options),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
        check=False,
    )
    return done.returncode, " ".join(done.stdout.split())


def metrics_of(output: Path) -> list[dict[str, Any]]:
    """Return the deterministic part of metrics.jsonl."""
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def test_run_killed_twice_ends_with_the_metrics_of_the_uninterrupted_one(
    workspace: Path, tmp_path: Path
) -> None:
    print("seed", SEED)
    rng = random.Random(SEED)
    home = shutil.copytree(workspace, tmp_path / "home")
    (home / "reward.py").write_text(REWARD)
    run_here(home, tmp_path / "whole")
    output = tmp_path / "killed"
    for kill_after in (1, 3):
        # A run that is fast gets no further than the next step but one, where it waits for its end.
        (home / "hangs_after").write_text(str(kill_after + 1))
        with subprocess.Popen(
            command(home, output), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert any(line.lstrip().startswith(f"{kill_after}/{STEPS}") for line in process.stdout)
            # Anywhere in what follows: writing the checkpoint, sampling, updating.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=rng.uniform(0.0, 1.5))
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        saved = [int(path.name[5:]) for path in (output / "checkpoints").glob("step-*")]
        assert len(metrics_of(output)) - max(saved, default=0) <= 1
    (home / "hangs_after").unlink()
    run_here(home, output)
    assert metrics_of(output) == metrics_of(tmp_path / "whole")
    assert [record["step"] for record in metrics_of(output)] == list(range(1, STEPS + 1))


def test_full_disk_at_checkpoint_time_leaves_a_run_that_resumes(
    workspace: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    without_export = {"checkpoint.export": "false"}
    run_here(workspace, output, **{"run.max_steps": 1, **without_export})
    code, said = on_a_small_disk(workspace, output, 500_000, **without_export)
    assert code == 2, said
    assert "the disk is full" in said
    assert "step 1 is the newest whole checkpoint" in said
    assert f"look at the run so far: moe-replay report {output}" in said
    assert [path.name for path in (output / "checkpoints").glob("step-*")] == ["step-000001"]
    run_here(workspace, output, **{"run.max_steps": 2, **without_export})
    assert [record["step"] for record in metrics_of(output)] == [1, 2]
