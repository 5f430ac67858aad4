"""FSDP2: each rank records and replays the routes of its own samples, as one process would."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.transformers.shards import gradients, loaded

from moe_replay.errors import ReplayScopeError
from moe_replay.testing.ranks import run_ranks

pytestmark = pytest.mark.ranks


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
