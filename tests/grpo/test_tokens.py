"""The tokens that a step keeps are those of the run, however its layers are spread over ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moe_replay.recipe.recipe import Recipe

from .test_loop import run

pytestmark = pytest.mark.ranks
Recipes = Callable[..., Recipe]


def _kept(made: Recipe) -> dict[int, dict[str, Any]]:
    lines = (made.run.output_dir / "completions.jsonl").read_text().splitlines()
    records = map(json.loads, lines)
    return {record["sample"]: record["tokens"] for record in records if record["tokens"]}


def test_flips_of_a_token_are_added_up_over_pipeline_stages(recipe: Recipes, tmp_path) -> None:
    keys = {"run__max_steps": 1, "checkpoint__export": "false"}
    one = recipe(logging__num_with_tokens=16, **keys)
    two = recipe(
        run__output_dir=str(tmp_path / "two"),
        logging__num_with_tokens=16,
        megatron__pipeline_model_parallel_size=2,
        megatron__num_layers_in_first_pipeline_stage=1,
        **keys,
    )
    (record,) = run(one)
    (other,) = run(two, world_size=2)
    whole, parts = _kept(one), _kept(two)
    assert list(whole) == list(parts) == list(range(16))
    for sample, tokens in whole.items():
        assert tokens["texts"] == parts[sample]["texts"]
        assert tokens["flips"] == parts[sample]["flips"]
        for name in ("rollout_logprobs", "old_logprobs"):
            assert np.allclose(tokens[name], parts[sample][name], atol=1e-4)
    flips = [count for tokens in whole.values() for count in tokens["flips"]]
    # In bfloat16 some flip in one of the three layers, and hardly any in all.
    assert 0 < np.mean(flips) < 1
    assert record["details"]["replay/flip_frac"] == other["details"]["replay/flip_frac"]


def test_without_replay_tokens_have_no_flips_and_without_texts_there_are_none(
    recipe: Recipes, tmp_path, capfd: pytest.CaptureFixture[str]
) -> None:
    keys = {"run__max_steps": 1, "checkpoint__export": "false"}
    made = recipe(replay__router_replay_mode="disabled", logging__num_with_tokens=2, **keys)
    run(made)
    # The end of a run names the command that shows it, on one line of a log.
    assert f"look at it: moe-replay report {made.run.output_dir}\n" in capfd.readouterr().out
    kept = _kept(made)
    assert list(kept) == [0, 1]
    assert [tokens["flips"] for tokens in kept.values()] == [None, None]
    none = recipe(run__output_dir=str(tmp_path / "none"), logging__completions=0, **keys)
    run(none)
    assert (none.run.output_dir / "completions.jsonl").read_text() == ""
