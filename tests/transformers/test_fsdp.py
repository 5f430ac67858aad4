"""FSDP2: each rank records and replays the routes of its own samples, as one process would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_replay.errors import ReplayScopeError
from moe_replay.testing.ranks import run_ranks
from moe_replay.transformers import record_routes, replay_routes

pytestmark = pytest.mark.ranks
TOKENS = torch.randint(4, 90, (4, 6), generator=torch.Generator().manual_seed(5))
LAYERS, EXPERTS, TOPK = 2, 16, 4


def foreign_routes(samples: list[int]) -> np.ndarray:
    """Return routes that differ between samples, positions and layers: [rows, layers, topk]."""
    sample, row, layer, slot = np.ix_(samples, range(6), range(LAYERS), range(TOPK))
    return ((5 * sample + 3 * row + 7 * layer + 4 * slot) % EXPERTS).reshape(-1, LAYERS, TOPK)


def loaded(path: Path, checkpointed: bool) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if checkpointed:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
    return model


def gradients(model: Any, samples: list[int], routed_as: list[int]) -> dict[str, np.ndarray]:
    """Record and replay these samples, and return the live routes and some gradients."""
    tokens = TOKENS[samples]
    with torch.no_grad(), record_routes(model) as recorder:
        model(tokens)
    recorded = recorder.take().numpy()
    routes = foreign_routes(routed_as)
    valid = np.ones(len(routes), dtype=bool)
    with replay_routes(model, routes, valid, layers=(0, 1)):
        model(tokens, labels=tokens).loss.backward()
    found = {"recorded": recorded}
    for name in ("model.layers.1.mlp.gate.weight", "model.layers.0.self_attn.q_proj.weight"):
        grad = model.get_parameter(name).grad
        found[name] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).numpy()
    return found


def sharded(path: Path, checkpointed: bool, routed_as: list[list[int]]) -> dict[str, np.ndarray]:
    """Return what a rank of two finds; rank r has samples 2r and 2r + 1."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = loaded(path, checkpointed)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    rank = dist.get_rank()
    return gradients(model, [2 * rank, 2 * rank + 1], routed_as[rank])


@pytest.mark.parametrize("checkpointed", [False, True])
def test_two_ranks_have_the_routes_and_gradients_of_one_process(family_dirs, checkpointed):
    path = family_dirs["qwen3_moe"]
    whole = gradients(loaded(path, checkpointed), [0, 1, 2, 3], [0, 1, 2, 3])
    ranks = run_ranks(sharded, 2, path, checkpointed, [[0, 1], [2, 3]])
    assert (np.concatenate([rank["recorded"] for rank in ranks]) == whole["recorded"]).all()
    for name in list(whole)[1:]:
        assert np.abs(whole[name]).max() > 1e-4
        for rank in ranks:
            np.testing.assert_allclose(rank[name], whole[name], atol=1e-6)


@pytest.mark.parametrize("routed_as", [[[0, 1], [0, 1]], [[0, 1], [2, 2]]])
def test_routes_of_another_shard_or_one_wrong_sample_show_in_the_gradients(family_dirs, routed_as):
    path = family_dirs["qwen3_moe"]
    whole = gradients(loaded(path, False), [0, 1, 2, 3], [0, 1, 2, 3])
    found = run_ranks(sharded, 2, path, False, routed_as)[0]
    name = "model.layers.1.mlp.gate.weight"
    assert np.abs(found[name] - whole[name]).max() > 1e-4


def test_routes_of_the_whole_batch_on_one_shard_are_refused(family_dirs):
    with pytest.raises(ReplayScopeError, match="24"):
        run_ranks(sharded, 2, family_dirs["qwen3_moe"], False, [[0, 1, 2, 3], [0, 1, 2, 3]])
