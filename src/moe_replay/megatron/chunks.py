"""The chunks of a built model on one rank: what wrappers hold, and where the routers are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter


def unwrap(chunk: torch.nn.Module) -> GPTModel:
    """Return the GPTModel inside DistributedDataParallel and Float16Module wrappers."""
    inner: Any = chunk
    while not isinstance(inner, GPTModel):
        inner = inner.module
    return inner


def moe_layers(chunks: Sequence[torch.nn.Module]) -> dict[int, TopKRouter]:
    """Return the router of each MoE layer that this rank holds, by global decoder layer.

    The layer comes from the built decoder layer, in every pipeline layout. Routers of
    multi-token-prediction layers are not in it: they are not decoder layers and keep routing live.
    """
    routers = {}
    for chunk in chunks:
        for layer in unwrap(chunk).decoder.layers:
            if isinstance(layer.mlp, MoELayer):
                routers[layer.layer_number - 1] = layer.mlp.router
    return dict(sorted(routers.items()))
