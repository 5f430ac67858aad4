"""Tensor and expert parallelism of transformers: routes are whole on each rank, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.transformers.shards import LAYERS, TOKENS, foreign_routes, gradients, loaded

from moe_replay.errors import ReplayScopeError, UnsupportedError
from moe_replay.testing.ranks import run_ranks
from moe_replay.transformers import record_routes, replay_routes

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.filterwarnings("ignore:`enable_expert_parallel`:FutureWarning"),
]
ALL = [0, 1, 2, 3]
SHARED = {
    "tensor parallel": {"tp_plan": "auto"},
    "experts by all-reduce": {"ep_size": 2, "ep_implementation": "all_reduce"},
    # Which exchanges tokens where there is a gradient.
    "the deprecated switch": {"enable_expert_parallel": True, "tp_plan": "auto"},
}
"""Layouts of two ranks that both have the whole batch."""


def distributed(path: Path, **layout: Any) -> Any:
    from transformers.distributed import DistributedConfig

    return loaded(path, False, distributed_config=DistributedConfig(**layout)).train()


def found_on_rank(path: Path, layout: dict[str, Any], routed_as: list[list[int]]) -> Any:
    """Return what a rank of two records, and its gradients under routes of ``routed_as``."""
    rank = torch.distributed.get_rank()
    samples = ALL if "tp_size" in layout else [2 * rank, 2 * rank + 1]
    return gradients(distributed(path, **layout), samples, routed_as[rank])


@pytest.mark.parametrize("layout", SHARED.values(), ids=SHARED)
def test_two_ranks_with_one_batch_have_the_routes_and_gradients_of_one_process(family_dirs, layout):
    path = family_dirs["qwen3_moe"]
    whole = gradients(loaded(path, False), ALL, ALL)
    for rank in run_ranks(found_on_rank, 2, path, {"tp_size": 2} | layout, [ALL, ALL]):
        assert (rank["recorded"] == whole["recorded"]).all()
        for name in list(whole)[1:]:
            assert np.abs(whole[name]).max() > 1e-4
            np.testing.assert_allclose(rank[name], whole[name], atol=1e-6)


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_other_families_have_the_same_routes_under_expert_parallelism(family_dirs, family):
    path = family_dirs[family]
    whole = gradients(loaded(path, False), ALL, ALL)
    for rank in run_ranks(found_on_rank, 2, path, {"tp_size": 2, "ep_size": 2}, [ALL, ALL]):
        assert (rank["recorded"] == whole["recorded"]).all()
        for name in list(whole)[1:]:
            np.testing.assert_allclose(rank[name], whole[name], atol=1e-6)


def test_ranks_with_their_own_batches_exchange_tokens_by_their_own_routes(family_dirs):
    path, layout = family_dirs["qwen3_moe"], {"fsdp_size": 2, "ep_size": 2}
    whole = gradients(loaded(path, False), ALL, ALL)
    ranks = run_ranks(found_on_rank, 2, path, layout, [[0, 1], [2, 3]])
    assert (np.concatenate([rank["recorded"] for rank in ranks]) == whole["recorded"]).all()
    gate = "model.layers.1.mlp.gate.weight"
    for rank in ranks:
        np.testing.assert_allclose(rank[gate], whole[gate], atol=1e-6)
    # One sample of four with another's routes shows on both.
    for rank in run_ranks(found_on_rank, 2, path, layout, [[0, 1], [2, 2]]):
        assert np.abs(rank[gate] - whole[gate]).max() > 1e-4


def refusal(path: Path, change: Any) -> str:
    """Return how a rank refuses routes that ``change`` has made of the right ones on rank 1."""
    model = distributed(path, tp_size=2, ep_size=2)
    routes = foreign_routes(ALL).astype(np.uint8)
    valid = np.ones(len(routes), dtype=bool)
    valid[3] = False
    if torch.distributed.get_rank() == 1:
        routes, valid = change(routes, valid)
    try:
        with torch.no_grad(), replay_routes(model, routes, valid, layers=tuple(range(LAYERS))):
            model(TOKENS)
    except ReplayScopeError as error:
        return str(error)
    return ""


def one_expert_of_one_layer(routes: np.ndarray, valid: np.ndarray) -> Any:
    changed = routes.copy()
    changed[17, 1, 0] = (set(range(16)) - set(routes[17, 1].tolist())).pop()
    return changed, valid


def one_row_live(routes: np.ndarray, valid: np.ndarray) -> Any:
    return routes, valid & (np.arange(len(valid)) != 20)


def rows_missing(routes: np.ndarray, valid: np.ndarray) -> Any:
    return routes[:-1], valid[:-1]


@pytest.mark.parametrize("change", [one_expert_of_one_layer, one_row_live, rows_missing])
def test_other_routes_on_one_rank_of_a_shared_batch_stop_both(family_dirs, change):
    for message in run_ranks(refusal, 2, family_dirs["qwen3_moe"], change):
        assert "routes of ranks [1] are not those of rank 0" in message


def other_ids_where_none_is_read(routes: np.ndarray, valid: np.ndarray) -> Any:
    changed = routes.astype(np.int64)
    changed[~valid] = 7
    return changed, valid


def test_ids_of_rows_that_are_routed_live_may_differ(family_dirs):
    found = run_ranks(refusal, 2, family_dirs["qwen3_moe"], other_ids_where_none_is_read)
    assert found == ["", ""]


def staged(path: Path) -> list[str]:
    model = distributed(path, pp_size=2)
    routes, valid = foreign_routes(ALL), np.ones(24, dtype=bool)
    said = []
    for scope in (
        lambda: record_routes(model),
        lambda: replay_routes(model, routes, valid, layers=(0, 1)),
    ):
        with pytest.raises(UnsupportedError) as refused, scope():
            pass
        said.append(str(refused.value))
    return said


def test_pipeline_stages_are_refused(family_dirs):
    for said in run_ranks(staged, 2, family_dirs["qwen3_moe"]):
        assert [("2 pipeline stages" in message) for message in said] == [True, True]
