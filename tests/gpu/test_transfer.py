"""Weights sent over NCCL to a rollout server on another GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from ..engines.servers.test_broadcast import _SERVER, pushing, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


def test_a_push_over_nccl_arrives_whole() -> None:
    visible = {"CUDA_VISIBLE_DEVICES": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **visible},
    ) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        with pushing(url, backend="nccl") as engine:
            for version in (1, 2):
                # The server checks every chunk before it loads them.
                engine.load_weights(weights(version), policy_version=version)
            assert engine._broadcast.num_sent == 6
            assert sum(engine.faults.values()) == 0
        server.kill()
