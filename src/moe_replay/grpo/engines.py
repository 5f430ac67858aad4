"""The engine that a recipe asks for; only its own module is imported.

In: a recipe, the trainer's device. Out: an Engine. Called by: grpo.loop, tests.
"""

from __future__ import annotations

import secrets
from functools import partial

import torch
import torch.distributed as dist

from moe_replay.grpo.config import Recipe
from moe_replay.rollout.types import Engine
from moe_replay.routing import ReplayMode
from moe_replay.sync.messages import gather_json


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
    if rollout.engine in ("vllm-server", "sglang-server"):
        return _server_engine(recipe, device, record_routes)
    from moe_replay.rollout.embedded import EmbeddedEngine

    return EmbeddedEngine(
        recipe.model.path,
        dtype=rollout.dtype,
        device=str(device),
        max_batch_size=rollout.max_batch_size,
        record_routes=record_routes,
    )


def _server_engine(recipe: Recipe, device: torch.device, record_routes: bool) -> Engine:
    """Return the recipe's servers as one engine, holding the weights of the checkpoint."""
    from moe_replay.rollout.bearer import read_token
    from moe_replay.rollout.model_facts import read_facts
    from moe_replay.rollout.server_engine import ServerEngine

    rollout = recipe.rollout
    world = dist.group.WORLD
    assert world is not None
    names = gather_json(secrets.token_hex(8), world, device=device)
    facts = read_facts(recipe.model.path)
    if rollout.engine == "sglang-server":
        from moe_replay.rollout.sglang_calls import SglangCalls

        connect = partial(SglangCalls, facts=facts)
    else:
        from moe_replay.rollout.vllm_calls import connect_vllm

        connect = partial(connect_vllm, facts=facts)
    engine = ServerEngine(
        rollout.urls,
        facts=facts,
        connect=connect,
        weights_dir=rollout.weights_dir,
        run=names[0],
        dtype=rollout.dtype,
        record_routes=record_routes,
        pushes=dist.get_rank() == 0,
        token=read_token(rollout.token_file),
        calls_per_server=max(1, rollout.max_batch_size // rollout.num_generations),
        timeout_s=rollout.timeout_s,
    )
    engine.restore(recipe.model.path)
    return engine
