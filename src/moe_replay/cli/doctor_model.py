"""The part of `moe-replay doctor` that asks Megatron-Core: model, layout, routes and refusals.

Importing it loads Megatron-Core. No process group is made and no weight is read.

In: a recipe. Out: parts of the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moe_replay.grpo.start.preflight import Preflight, ranks_needed
from moe_replay.megatron.model import ModelShape
from moe_replay.megatron.replay.refusals import judge
from moe_replay.megatron.upstream import compat
from moe_replay.recipe.recipe import Recipe
from moe_replay.recipe.sections.training import ParallelLayout
from moe_replay.routing import expert_dtype


def add_model(report: dict[str, Any], found: Preflight) -> None:
    """Fill in ``model``, ``layout``, ``routes`` and ``options``, as far as the problems allow."""
    shape, layout = found.shape, found.recipe.megatron
    assert shape is not None
    report["model"] = model_of(shape, found.recipe)
    if found.config is None:
        return
    num_ranks = found.process.world_size
    report["layout"] = layout_of(layout, shape, found.stages, num_ranks)
    if shape.num_moe_layers:
        report["routes"] = routes_of(found.recipe, layout, shape, found.stages, num_ranks)
    report["options"] = [
        {"option": refusal.option, "state": verdict.value, "why": refusal.why}
        for refusal, verdict in judge(found.config)
    ]


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
