"""Whole training runs over servers that speak SGLang's HTTP API."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moe_replay.engines.embedded.engine import EmbeddedEngine
from moe_replay.recipe.recipe import Recipe

from ..support.served import listening
from ..support.sglang_like import SglangLike
from .test_loop import run

pytestmark = [pytest.mark.ranks, pytest.mark.vllm]
Recipes = Callable[..., Recipe]


def test_r3_over_sglang_servers_with_equal_numerics_has_no_engine_gap(
    recipe: Recipes, workspace: Path, tmp_path: Path
) -> None:
    engine = EmbeddedEngine(workspace / "model", dtype="float32")
    with listening(SglangLike(engine, num_decoder_layers=3).application()) as url:
        keys = {
            "rollout__engine": "sglang-server",
            "rollout__urls": f'["{url}"]',
            "rollout__dtype": "float32",
            "rollout__weights_dir": tmp_path,
        }
        records = run(recipe(**keys))
        again = run(recipe(**keys), world_size=2, restart=True)
    assert [record["policy_version"] for record in records] == [1, 2, 3]
    for record in [*records, *again]:
        assert record["replay/agreement"] == 1.0
        assert record["replay/coverage"] == 1.0
        assert record["rollout_correction/k3_kl"] < 1e-9
        assert abs(record["rollout_correction/ratio_mean"] - 1) < 1e-5
    assert {v for k, v in records[-1].items() if k.startswith("rollout/faults_")} == {0.0}
    # The second run found the weights of the first in the server, and put the checkpoint's back.
    assert [r["reward"] for r in again] == [r["reward"] for r in records]
