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
from pathlib import Path
from typing import Any

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


def command(workspace: Path, output: Path, **options: Any) -> list[str]:
    """Return the command that trains into ``output``."""
    settings = {"run.output_dir": output, "run.max_steps": STEPS, **options}
    overrides = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    recipe = str(workspace / "recipe.toml")
    return [sys.executable, "-m", "moe_replay.cli.main", "train", recipe, *overrides]


def finish(
    workspace: Path, output: Path, *, limit_bytes: int | None = None, **options: Any
) -> tuple[int, str]:
    """Train to the end; return the exit code and what was printed, in one line."""

    def limit_files() -> None:
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))

    done = subprocess.run(
        command(workspace, output, **options),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=limit_files,
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
    assert finish(home, tmp_path / "whole")[0] == 0
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
    code, said = finish(home, output)
    assert code == 0, said
    assert metrics_of(output) == metrics_of(tmp_path / "whole")
    assert [record["step"] for record in metrics_of(output)] == list(range(1, STEPS + 1))


def test_full_disk_at_checkpoint_time_leaves_a_run_that_resumes(
    workspace: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    without_export = {"checkpoint.export": "false"}
    assert finish(workspace, output, **{"run.max_steps": 1, **without_export})[0] == 0
    code, said = finish(workspace, output, limit_bytes=500_000, **without_export)
    assert code == 2, said
    assert "the disk is full" in said
    assert "step 1 is the newest whole checkpoint" in said
    assert [path.name for path in (output / "checkpoints").glob("step-*")] == ["step-000001"]
    code, said = finish(workspace, output, **{"run.max_steps": 2, **without_export})
    assert code == 0, said
    assert [record["step"] for record in metrics_of(output)] == [1, 2]
