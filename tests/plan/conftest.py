"""Shapes of real models from their config.json, and recipes for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Imported before the tests do: it silences Megatron-Core's own imports.
import moe_replay.megatron  # noqa: F401
from moe_replay.megatron.families.family import ModelShape
from moe_replay.megatron.model import read_model_shape
from moe_replay.recipe.load import recipe_from_table
from moe_replay.recipe.recipe import Recipe

RECIPES = Path(__file__).parents[2] / "recipes"
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


@pytest.fixture(scope="session")
def shape() -> Callable[[str], ModelShape]:
    """Return a function: folder of a recipe -> shape of its model."""
    return lambda name: read_model_shape(RECIPES / name / "model")


@pytest.fixture
def recipe() -> Callable[..., Recipe]:
    """Return a function that makes a recipe for Qwen3-30B-A3B with servers."""

    def make(*, rollout: dict[str, Any] | None = None, **sections: Any) -> Recipe:
        engine = {"engine": "vllm-server", "urls": ["http://127.0.0.1:1"]}
        table: dict[str, Any] = {
            "run": {"output_dir": "/nowhere", "max_steps": 2},
            "model": {"path": str(RECIPES / "qwen3-30b-a3b" / "model"), "dtype": "bfloat16"},
            "data": {"train": "reasoning_gym:chain_sum", "max_prompt_length": 1024},
            "rewards": [{"function": "reasoning_gym"}],
            "rollout": {"max_completion_length": 7168} | (engine if rollout is None else rollout),
            "batch": {
                "global_batch_size": 512,
                "max_tokens_per_microbatch": 16384,
                "logprob_chunk_size": 1024,
            },
            "megatron": {"expert_model_parallel_size": 8, **FULL},
        }
        for name, keys in sections.items():
            table[name] = {**table.get(name, {}), **keys}
        return recipe_from_table(table).on_device("cuda")

    return make
