"""The Slurm script runs here as Slurm would run it, by stand-ins for ``srun`` and ``scontrol``."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_replay.checkpoint.tokenizer import load_tokenizer
from moe_replay.testing.tiny_models import write_tiny_checkpoint

pytestmark = [pytest.mark.ranks, pytest.mark.slow]
SCRIPT = Path(__file__).parents[2] / "recipes/slurm/train.sbatch"

SRUN = """#!/usr/bin/env bash
# As many tasks as asked for, all on this machine; one that fails ends the step.
while [[ $1 == --* ]]; do
    [[ $1 == --ntasks=* ]] && tasks=${1#*=}
    shift
done
pids=()
trap 'kill "${pids[@]}" 2>/dev/null; wait' TERM
for ((task = 0; task < tasks; task++)); do
    SLURM_PROCID=$task "$@" &
    pids+=($!)
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit "$status"
"""

SCONTROL = """#!/usr/bin/env bash
[ "$1" != requeue ] && { tr , '\\n' <<<"$3"; exit; }
echo "$2" >>"$REQUEUED"
"""

STOPPING = """
import os, signal

calls = 0

def low(completions, completion_ids, **columns):
    global calls
    calls += 1
    if calls == 2:
        os.kill(os.getppid(), signal.SIGTERM)
    return [-float(ids[0]) for ids in completion_ids]
"""

RECIPE = """
[run]
output_dir = "unused"
max_steps = 2
[model]
path = "model"
[data]
train = "train.jsonl"
max_prompt_length = 32
[[rewards]]
function = "reward.py:low"
[rollout]
max_completion_length = 6
num_generations = 2
dtype = "float32"
[batch]
global_batch_size = 4
micro_batch_size = 2
[checkpoint]
export = false
"""


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs the script as a job of the given nodes."""
    write_tiny_checkpoint(tmp_path / "model")
    load_tokenizer(tmp_path / "model")
    (tmp_path / "train.jsonl").write_text('{"prompt": "one:"}\n{"prompt": "two:"}\n')
    (tmp_path / "reward.py").write_text(
        "def low(completions, completion_ids, **columns):\n"
        "    return [-float(ids[0]) for ids in completion_ids]\n"
    )
    (tmp_path / "recipe.toml").write_text(RECIPE)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        command = tmp_path / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(text)
        command.chmod(0o755)

    def run(*options: str, nodes: str, **environ: str) -> subprocess.CompletedProcess[str]:
        ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        slurm = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": nodes, "SLURM_GPUS_ON_NODE": "1"}
        names = {"PATH": path, "REQUEUED": str(tmp_path / "requeued"), "MASTER_PORT": free_port()}
        script = subprocess.Popen(
            [str(SCRIPT), "recipe.toml", "out", *options],
            cwd=tmp_path,
            env=ours | names | slurm | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            output, errors = script.communicate(timeout=800)
        finally:
            # Also what a script that fails or hangs has started.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(script.pid, signal.SIGKILL)
        return subprocess.CompletedProcess(script.args, script.returncode, output, errors)

    return run


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def ended(folder: Path) -> dict[str, object]:
    return json.loads((folder / "out/ended.json").read_text())


def test_two_nodes_train_and_a_finished_run_is_not_queued_again(
    job: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = job(nodes="127.0.0.1,localhost")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 data-parallel replica(s)" in done.stdout, done.stdout
    assert ended(tmp_path) == {"step": 2, "max_steps": 2, "stopped_by": None}
    assert not (tmp_path / "requeued").exists()


def test_a_job_at_its_time_limit_is_saved_and_queued_again(
    job: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    # The limit is an hour away, so that it does not depend on the machine; the trainer is stopped
    # as it would be there, while the second step is scored.
    (tmp_path / "reward.py").write_text(STOPPING)
    before = time.time()
    done = job(nodes="127.0.0.1", SLURM_JOB_END_TIME=str(int(before) + 3600), SPARE_S="600")
    assert done.returncode == 0, done.stdout + done.stderr
    assert ended(tmp_path) == {"step": 1, "max_steps": 2, "stopped_by": "SIGTERM"}
    assert (tmp_path / "requeued").read_text() == "17\n"
    limit = float(tomllib.loads((tmp_path / "out/recipe.toml").read_text())["run"]["max_time"])
    assert 2990 - (time.time() - before) <= limit <= 3000


def test_a_mistake_is_not_queued_again(
    job: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = job("--run.max_stepz", "3", nodes="127.0.0.1")
    assert done.returncode == 1
    assert "max_steps" in done.stdout + done.stderr
    assert not (tmp_path / "requeued").exists()


@pytest.mark.vllm
def test_the_first_node_samples_for_the_second(
    job: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = job(
        nodes="127.0.0.1,localhost",
        SERVER_NODES="1",
        SERVE_PORT=free_port(),
        SERVE_OPTIONS="--dtype float32",
        MODEL="model",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert ended(tmp_path) == {"step": 2, "max_steps": 2, "stopped_by": None}
    assert "vllm-server" in done.stdout
    assert not list(tmp_path.glob(".token*"))
