"""Two torchrun agents on loopback, like two machines: one rank each, tensor parallel."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.ranks, pytest.mark.slow]
TRAIN = ("-m", "moe_replay.cli.main", "train")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def agent(node: int, port: int, arguments: Sequence[str]) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        f"--node-rank={node}",
        "--nproc-per-node=1",
        "--master-addr=127.0.0.1",
        f"--master-port={port}",
        *TRAIN,
        *arguments,
    ]


def arguments_for(workspace: Path, out: Path, *more: str) -> list[str]:
    return [
        str(workspace / "recipe.toml"),
        "--run.output_dir",
        str(out),
        "--run.max_steps",
        "1",
        "--rollout.dtype",
        "float32",
        *more,
    ]


def metrics(out: Path) -> dict[str, Any]:
    (line,) = (out / "metrics.jsonl").read_text().splitlines()
    return json.loads(line)


def test_two_agents_train_as_one_process_does(workspace: Path, tmp_path: Path) -> None:
    # An agent is no part of the test run.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    layout = ("--megatron.tensor_model_parallel_size", "2")
    port = free_port()
    agents = [
        subprocess.Popen(
            agent(node, port, arguments_for(workspace, tmp_path / "two", *layout)),
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    try:
        said = [process.communicate()[0] for process in agents]
    finally:
        for process in agents:
            process.kill()
            process.wait()
    assert [process.returncode for process in agents] == [0, 0], said
    alone = arguments_for(workspace, tmp_path / "one")
    subprocess.run([sys.executable, *TRAIN, *alone], env=environ, check=True, capture_output=True)
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert two["reward"] == one["reward"]
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    assert two["replay/agreement"] == one["replay/agreement"] == 1.0
    assert two["replay/coverage"] == one["replay/coverage"] == 1.0
    assert "tensor 2" in said[0]
