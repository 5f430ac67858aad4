"""Compiled models replay: code stops at each router, and each scope's ids are its own."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import torch
from moe_replay.testing.moe_families import tiny_family
from moe_replay.transformers import record_routes, replay_routes

model = tiny_family("qwen3_moe", num_hidden_layers=1)
valid = torch.ones(18, dtype=torch.bool)

block = model.model.layers[0].mlp
states = torch.randn(2, 9, 32)

def output(run, ids):
    with replay_routes(model, ids, valid, layers=(0,)):
        return run(states)

with torch.no_grad():
    with record_routes(model) as recorder:
        live = block(states)
    own = recorder.take().long()
    try:
        output(torch.compile(block, backend="eager", fullgraph=True), own)
    except Exception as error:
        print("refused:", type(error).__name__)
    compiled = torch.compile(block, backend="eager")
    assert torch.allclose(compiled(states), live, atol=1e-5)
    for ids in (own, (own + 3) % 8):
        expected = output(block, ids)
        assert torch.allclose(output(compiled, ids), expected, atol=1e-5)
        assert torch.equal(expected, live) == (ids is own)
    with record_routes(model) as recorder:
        compiled(states)
    assert torch.equal(recorder.take().long(), own)
    assert torch.allclose(compiled(states), live, atol=1e-5)
"""


def test_a_compiled_model_replays_each_scopes_routes_and_one_graph_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        env={**os.environ, "TORCHDYNAMO_DISABLE": "0"},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "refused: Unsupported" in done.stdout
