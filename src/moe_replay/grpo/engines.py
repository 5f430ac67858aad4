"""What a recipe asks of its engine: which one, how it samples, and for which prompts."""

from __future__ import annotations

from dataclasses import replace

import torch

from moe_replay.engines.registry import EngineUse, engine_entry
from moe_replay.engines.types import Engine, Request, SamplingParams
from moe_replay.megatron.ranks.messages import all_ranks
from moe_replay.recipe.recipe import Recipe
from moe_replay.routing import Routing
from moe_replay.tasks.encoding import Prompt


def engine_use(recipe: Recipe) -> EngineUse:
    """Return what a recipe asks of its engine beside the engine's own keys."""
    return EngineUse(
        model_dir=recipe.model.path,
        max_context_length=recipe.max_sequence_length,
        record_routes=recipe.replay.router_replay_mode.passes.engine is Routing.RECORD,
        keeps_candidates=recipe.rollout.truncates,
    )


def recipe_engine(recipe: Recipe, device: torch.device) -> Engine:
    """Return the engine of ``[rollout]``, started, as `EngineEntry.open_engine` does."""
    return engine_entry(recipe.rollout).open_engine(
        recipe.rollout, engine_use(recipe), device=str(device), ranks=all_ranks()
    )


def recipe_sampling(recipe: Recipe) -> SamplingParams:
    """Return how training completions are sampled."""
    rollout = recipe.rollout
    return SamplingParams(
        max_completion_length=rollout.max_completion_length,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        min_p=rollout.min_p,
        stop_token_ids=rollout.stop_token_ids,
        seed=recipe.run.seed,
        keeps_candidates=rollout.truncates,
    )


def eval_sampling(recipe: Recipe) -> SamplingParams:
    """Return how held-out completions are sampled; what ends them is that of the rollout."""
    settings, rollout = recipe.eval, recipe_sampling(recipe)
    return replace(
        rollout,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        min_p=settings.min_p,
        # Nothing is trained on them.
        keeps_candidates=False,
        max_completion_length=settings.max_completion_length or rollout.max_completion_length,
    )


def training_request(recipe: Recipe, position: int, prompt: Prompt) -> Request:
    """Return the request for the training prompt at a position, which is also its id."""
    return Request(
        request_id=position,
        prompt_ids=prompt.prompt_ids,
        num_generations=recipe.rollout.num_generations,
    )
