"""Runs with the released DeepSeek-V2's router, whose groups Megatron-Core scores otherwise.

And one with gpt-oss, whose checkpoints stack the experts of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moe_replay.recipe.recipe import Recipe
from moe_replay.testing.tiny_models import write_tiny_checkpoint

from .test_loop import run

pytestmark = pytest.mark.ranks
RELEASED = {
    "topk_method": "group_limited_greedy",
    "n_routed_experts": 160,
    "num_experts_per_tok": 6,
    "n_group": 8,
    "topk_group": 3,
    "moe_intermediate_size": 8,
}


@pytest.mark.parametrize("mode", ["R2", "R3"])
def test_t22_a_run_agrees_with_the_engine_and_replays_its_groups(
    recipe: Callable[..., Recipe], tmp_path: Path, mode: str
):
    model = write_tiny_checkpoint(
        tmp_path / "model", "deepseek_v2", num_hidden_layers=2, **RELEASED
    )
    first, *_ = run(
        recipe(
            model__path=model,
            replay__router_replay_mode=mode,
            rollout__dtype="float32",
            run__max_steps=1,
        )
    )
    assert first["replay/agreement"] == 1.0
    assert first["rollout_correction/k3_kl"] < 1e-9


def test_a_run_of_gpt_oss_agrees_with_the_engine_after_a_push_too(
    recipe: Callable[..., Recipe], tmp_path: Path
):
    model = write_tiny_checkpoint(tmp_path / "model", "gpt_oss", num_hidden_layers=2)
    steps = run(
        recipe(
            model__path=model,
            replay__router_replay_mode="R3",
            rollout__dtype="float32",
            run__max_steps=2,
        )
    )
    for step in steps[:2]:
        assert step["replay/agreement"] == 1.0
        assert step["rollout_correction/k3_kl"] < 1e-9
