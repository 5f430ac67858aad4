"""The engine that a recipe asks for; only its own module is imported.

In: a recipe, the trainer's device. Out: an Engine, and what is asked of it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from moe_replay.engines.types import Engine, Request, SamplingParams
from moe_replay.megatron.ranks.messages import all_ranks
from moe_replay.recipe.recipe import Recipe
from moe_replay.routing import Routing
from moe_replay.tasks.prompts import Prompt

TRIAL = "trial"
"""In place of a run's name while a push is tried."""

if TYPE_CHECKING:
    from moe_replay.checkpoint.facts import ModelFacts
    from moe_replay.engines.servers.engine import ServerEngine


def recipe_engine(recipe: Recipe, device: torch.device) -> Engine:
    """Return the engine of ``[rollout]``, started.

    Raises:
        RecipeError: when its library is not installed or an option does not fit it.
        UnsupportedError: when its release cannot keep the contract of an engine.
        EngineError: when it does not start, or cannot return what the recipe's mode needs.
    """
    rollout, record_routes = recipe.rollout, _records(recipe)
    if rollout.engine == "vllm":
        from moe_replay.engines.vllm.engine import VllmEngine

        return VllmEngine(
            recipe.model.path,
            dtype=rollout.dtype,
            max_batch_size=rollout.max_batch_size,
            max_context_length=recipe.max_sequence_length,
            kv_cache_gib=rollout.kv_cache_gib,
            gpu_memory_utilization=rollout.gpu_memory_utilization,
            tensor_parallel_size=rollout.tensor_parallel_size,
            record_routes=record_routes,
        )
    if rollout.engine in ("vllm-server", "sglang-server"):
        return _server_engine(recipe, device)
    if rollout.engine == "files":
        from moe_replay.checkpoint.facts import read_facts

        return _files_engine(recipe, read_facts(recipe.model.path))
    from moe_replay.engines.embedded.engine import EmbeddedEngine

    return EmbeddedEngine(
        recipe.model.path,
        dtype=rollout.dtype,
        device=str(device),
        max_batch_size=rollout.max_batch_size,
        record_routes=record_routes,
    )


def recipe_sampling(recipe: Recipe) -> SamplingParams:
    """Return how training completions are sampled."""
    rollout = recipe.rollout
    return SamplingParams(
        max_completion_length=rollout.max_completion_length,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        stop_token_ids=rollout.stop_token_ids,
        seed=recipe.run.seed,
    )


def training_request(recipe: Recipe, position: int, prompt: Prompt) -> Request:
    """Return what is asked of the engine for the training prompt at a position, which is also the request's id."""
    return Request(
        request_id=position,
        prompt_ids=prompt.prompt_ids,
        num_generations=recipe.rollout.num_generations,
    )


def check_engine(
    recipe: Recipe,
    facts: ModelFacts,
    *,
    world_size: int,
    num_attention_heads: int,
    tries_push: bool = False,
) -> list[str]:
    """Ask what would keep the engine of ``[rollout]`` from starting, without starting it; return what is worth knowing.

    Servers and files are asked. With ``tries_push`` servers are also given the checkpoint and sample by it, unless another
    run may be at work on them.

    Raises:
        RecipeError: when an option, a server or a file does not fit the model or the number of processes.
        UnsupportedError: when the engine cannot load the checkpoint's layout.
        EngineError: when a server does not answer.
    """
    rollout = recipe.rollout
    if rollout.engine == "vllm":
        from moe_replay.engines.vllm.ranks import check_ranks
        from moe_replay.engines.vllm.startup import check_loadable

        check_ranks(rollout.tensor_parallel_size, world_size)
        check_loadable(facts, rollout.tensor_parallel_size, num_attention_heads=num_attention_heads)
    elif rollout.engine in ("vllm-server", "sglang-server"):
        return _try_servers(recipe, facts, tries_push=tries_push)
    elif rollout.engine == "files":
        _files_engine(recipe, facts).close()
    return []


def _try_servers(recipe: Recipe, facts: ModelFacts, *, tries_push: bool) -> list[str]:
    engine = _connect(recipe, facts, run=TRIAL)
    try:
        busy = engine.busy
        if tries_push and not busy:
            engine.restore(recipe.model.path)
    finally:
        engine.close()
    if not tries_push or not busy:
        return []
    return [
        f"{', '.join(f'{url} holds weights of run {run}' for url, run in busy.items())}: no push was tried, because that run "
        "would stop if it is at work there; a start will push"
    ]


def _files_engine(recipe: Recipe, facts: ModelFacts) -> Engine:
    from moe_replay.engines.files.engine import FilesEngine

    assert recipe.rollout.path is not None
    return FilesEngine(
        recipe.rollout.path,
        facts=facts,
        record_routes=_records(recipe),
        allow_stale=recipe.rollout.allow_stale,
    )


def _server_engine(recipe: Recipe, device: torch.device) -> Engine:
    """Return the recipe's servers as one engine, after a push of the checkpoint to each of them.

    So a push is tried before anything is sampled, and no server answers by weights that it happened to hold.
    """
    from moe_replay.checkpoint.facts import read_facts

    ranks = all_ranks()
    run = ranks.gather(secrets.token_hex(8))[0]
    facts = read_facts(recipe.model.path)
    engine = _connect(
        recipe,
        facts,
        run=run,
        num_ranks=ranks.size,
        pushes=ranks.rank == 0,
        share=ranks.gather,
    )
    try:
        engine.restore(recipe.model.path)
    except BaseException:
        engine.close()
        raise
    return engine


def _connect(
    recipe: Recipe,
    facts: ModelFacts,
    *,
    run: str,
    num_ranks: int = 1,
    pushes: bool = True,
    share: Callable[[Any], list[Any]] | None = None,
) -> ServerEngine:
    from moe_replay.engines.servers.engine import ServerEngine
    from moe_replay.recipe.bearer import read_token

    rollout = recipe.rollout
    if rollout.engine == "sglang-server":
        from moe_replay.engines.servers.sglang import SglangCalls

        connect = partial(SglangCalls, facts=facts, ca_file=rollout.ca_file)
    else:
        from moe_replay.engines.servers.vllm import connect_vllm

        connect = partial(connect_vllm, facts=facts, ca_file=rollout.ca_file)
    return ServerEngine(
        rollout.urls,
        facts=facts,
        connect=connect,
        weights_dir=rollout.weights_dir,
        run=run,
        dtype=rollout.dtype,
        record_routes=_records(recipe),
        pushes=pushes,
        share=share,
        token=read_token(rollout.token_file),
        # Every rank asks every server: of 128 sequences at once on each server, 8 ranks with groups of 4 ask for 4 groups.
        calls_per_server=max(1, rollout.max_batch_size // (rollout.num_generations * num_ranks)),
        timeout_s=rollout.timeout_s,
    )


def _records(recipe: Recipe) -> bool:
    return recipe.replay.router_replay_mode.passes.engine is Routing.RECORD
