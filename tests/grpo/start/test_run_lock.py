"""One run directory, one writer: held by the operating system, whatever becomes of the process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import moe_replay
from moe_replay.errors import CheckpointError
from moe_replay.grpo.start.run_lock import RunLock
from moe_replay.recipe.recipe import Recipe

from ..test_loop import run

SOURCES = Path(moe_replay.__file__).parents[1]
HOLD = """
import os, sys, time
from pathlib import Path
from moe_replay.grpo.start.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
if os.fork() == 0:
    os.setsid()
    print(os.getpid(), flush=True)
time.sleep(600)
"""


class Holder:
    """A process that holds a directory, and has forked one that outlives it."""

    def __init__(self, directory: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(directory)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(SOURCES)},
        )
        assert self.process.stdout is not None
        self.orphan = int(self.process.stdout.readline())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        os.kill(self.orphan, signal.SIGKILL)
        assert self.process.stdout is not None
        self.process.stdout.close()


def test_r3_a_second_writer_is_refused_by_pid_and_host(tmp_path: Path) -> None:
    holder = Holder(tmp_path / "run")
    try:
        named = f"process {holder.process.pid} on {socket.gethostname()}"
        with pytest.raises(CheckpointError, match=named):
            RunLock(tmp_path / "run")
        assert json.loads((tmp_path / "run" / "run.lock").read_text())["pid"] == holder.process.pid
        holder.kill()
        # The forked process is still there, and holds nothing.
        os.kill(holder.orphan, 0)
        RunLock(tmp_path / "run").release()
    finally:
        holder.close()


@pytest.mark.ranks
def test_r3_no_rank_trains_in_a_directory_of_another_trainer(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    free = recipe(run__max_steps=1, run__output_dir=tmp_path / "free")
    taken = recipe(run__max_steps=1, run__output_dir=tmp_path / "taken")
    holder = Holder(tmp_path / "taken")
    try:
        for world_size in (1, 2):
            with pytest.raises(CheckpointError, match=f"process {holder.process.pid}"):
                run(taken, world_size=world_size)
        assert sorted(path.name for path in taken.run.output_dir.iterdir()) == ["run.lock"]
        assert len(run(free, world_size=2)) == 1
    finally:
        holder.close()


def test_r3_a_directory_that_was_given_back_is_free(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    assert lock.note is None
    lock.release()
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys\nfrom pathlib import Path\nfrom moe_replay.grpo.start.run_lock import RunLock\n"
            "RunLock(Path(sys.argv[1]))",
            str(tmp_path),
        ],
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
        check=False,
    )
    assert done.returncode == 0


def test_r3_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"run\.output_dir needs a folder"):
        RunLock(tmp_path / "file" / "run")
