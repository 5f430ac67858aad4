"""The part of `moe-replay doctor` that asks Megatron-Core: the model, its layout, its routes, and the table of refusals.

Importing it loads Megatron-Core. No process group is made and no weight is read.

In: a recipe. Out: parts of the report. Called by: cli.doctor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from moe_replay.errors import UnsupportedError
from moe_replay.grpo.config import ProcessSpec, Recipe
from moe_replay.grpo.model_settings import TRAINER_DTYPES, override_fields, run_layout
from moe_replay.megatron import compat
from moe_replay.megatron.layout import ParallelLayout
from moe_replay.megatron.model import ModelShape, read_model_shape, transformer_config
from moe_replay.megatron.refusals import Verdict, judge
from moe_replay.megatron.stages import stage_layers
from moe_replay.routing import expert_dtype

Noting = Callable[[list[str]], AbstractContextManager[None]]


def add_model(report: dict[str, Any], recipe: Recipe, process: ProcessSpec, noting: Noting) -> None:
    """Fill in ``model``, ``layout``, ``routes`` and ``options``, as far as no problem is in the way.

    Raises:
        RecipeError: there is no checkpoint, or of an architecture that is not supported.
    """
    problems = report["problems"]
    shape = read_model_shape(recipe.model.path)
    report["model"] = model_of(shape, recipe)
    if recipe.replays and not shape.num_moe_layers:
        problems.append(
            f"{recipe.model.path} is dense, so there is nothing to replay; set replay.router_replay_mode = 'disabled'"
        )
    layout = run_layout(recipe)
    with noting(problems):
        recipe.check_world(ranks_needed(layout))
    if process.launched_by_torchrun:
        with noting(problems):
            check_started(layout, recipe, process.world_size)
    config = transformer_config(
        shape,
        layout,
        dtype=TRAINER_DTYPES[recipe.model.dtype],
        overrides=override_fields(recipe),
    )
    stages = stage_layers(config)
    num_ranks = process.world_size if process.launched_by_torchrun else ranks_needed(layout)
    report["layout"] = layout_of(layout, shape, stages, num_ranks)
    if shape.num_moe_layers:
        report["routes"] = routes_of(recipe, layout, shape, stages, num_ranks)
    report["options"] = [
        {"option": refusal.option, "state": verdict.value, "why": refusal.why}
        for refusal, verdict in judge(config)
    ]
    if recipe.replays:
        problems += [
            f"replay cannot be exact with {refusal.option}: {refusal.why}; set {refusal.remedy}"
            for refusal, verdict in judge(config)
            if verdict is Verdict.REFUSED
        ]


def ranks_needed(layout: ParallelLayout) -> int:
    """Return the least number of ranks; every multiple of it works, if the batch divides by its replicas."""
    return math.lcm(layout.model_parallel_size, layout.expert_parallel_size)


def check_started(layout: ParallelLayout, recipe: Recipe, world_size: int) -> None:
    """Raise `RecipeError` unless ``world_size`` ranks hold whole copies of the model and share the batch evenly."""
    if world_size % ranks_needed(layout):
        raise UnsupportedError(
            f"{world_size} processes were started, [megatron] needs a multiple of {ranks_needed(layout)} "
            f"({layout.describe()}); start another number or change the sizes"
        )
    recipe.check_world(world_size)


def model_of(shape: ModelShape, recipe: Recipe) -> dict[str, Any]:
    """Return what the checkpoint's config says of its routers."""
    dense = sorted(set(range(shape.num_layers)) - set(shape.moe_layers))
    return {
        "path": str(recipe.model.path),
        "family": shape.family,
        "num_layers": shape.num_layers,
        "moe_layers": list(shape.moe_layers),
        "dense_layers": dense,
        "num_mtp_layers": shape.num_mtp_layers,
        "num_experts": shape.num_experts,
        "topk": shape.topk,
    }


def layout_of(
    layout: ParallelLayout,
    shape: ModelShape,
    stages: Sequence[Sequence[int]],
    num_ranks: int,
) -> dict[str, Any]:
    """Return how ranks are divided, and what each pipeline stage holds."""
    return {
        "description": layout.describe(),
        "num_ranks": num_ranks,
        "multiple_of": ranks_needed(layout),
        "ranks_per_replica": layout.model_parallel_size,
        "num_replicas": num_ranks // layout.model_parallel_size,
        "ranks_per_copy_of_experts": layout.expert_parallel_size,
        "stages": [
            {
                "layers": list(layers),
                "moe_layers": [layer for layer in layers if layer in shape.moe_layers],
            }
            for layers in stages
        ],
        "device": f"{torch.cuda.device_count()} GPUs" if torch.cuda.is_available() else "CPU",
        "transformer_engine": compat.transformer_engine_usable(),
    }


def routes_of(
    recipe: Recipe,
    layout: ParallelLayout,
    shape: ModelShape,
    stages: Sequence[Sequence[int]],
    num_ranks: int,
) -> dict[str, Any]:
    """Return the bytes of routes: of a token, and at most on the rank that holds most of them."""
    id_bytes = expert_dtype(shape.num_experts).itemsize
    fullest = max(sum(layer in shape.moe_layers for layer in layers) for layers in stages)
    # One byte a row says whether it has a route.
    row_bytes = fullest * shape.topk * id_bytes + 1
    shards = layout.tensor_model_parallel_size * layout.context_parallel_size
    batch = recipe.batch
    tokens = batch.max_tokens_per_microbatch or (
        (batch.micro_batch_size or 1) * recipe.max_sequence_length
    )
    num_replicas = num_ranks // layout.model_parallel_size
    per_step = -(-recipe.samples_per_step // num_replicas) * recipe.max_sequence_length
    return {
        "bytes_per_token": shape.num_moe_layers * shape.topk * id_bytes,
        "id_bytes": id_bytes,
        "max_bytes_per_rank_and_microbatch": -(-tokens // shards) * row_bytes,
        "max_bytes_per_rank_and_step": -(-per_step // shards) * row_bytes,
    }
