"""The engine that a recipe asks for; only its own module is imported.

In: a recipe, the trainer's device. Out: an Engine. Called by: grpo.loop, tests.
"""

from __future__ import annotations

import torch

from moe_replay.grpo.config import Recipe
from moe_replay.rollout.types import Engine
from moe_replay.routing import ReplayMode


def recipe_engine(recipe: Recipe, device: torch.device) -> Engine:
    """Return the engine of ``[rollout]``, started.

    Raises:
        RecipeError: when its library is not installed or an option does not fit it.
        UnsupportedError: when its release cannot keep the contract of an engine.
        EngineError: when it does not start, or cannot return what the recipe's mode needs.
    """
    rollout = recipe.rollout
    record_routes = recipe.replay.router_replay_mode is ReplayMode.R3
    if rollout.engine == "vllm":
        from moe_replay.rollout.vllm_engine import VllmEngine

        return VllmEngine(
            recipe.model.path,
            dtype=rollout.dtype,
            max_batch_size=rollout.max_batch_size,
            max_context_length=recipe.max_sequence_length,
            kv_cache_gib=rollout.kv_cache_gib,
            record_routes=record_routes,
        )
    from moe_replay.rollout.embedded import EmbeddedEngine

    return EmbeddedEngine(
        recipe.model.path,
        dtype=rollout.dtype,
        device=str(device),
        max_batch_size=rollout.max_batch_size,
        record_routes=record_routes,
    )
