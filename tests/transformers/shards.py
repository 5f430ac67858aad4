"""Gradients of a batch under foreign routes, in one process or on a rank that has part of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_replay.transformers import find_routers, record_routes, replay_routes

TOKENS = torch.randint(4, 90, (4, 6), generator=torch.Generator().manual_seed(5))
LAYERS, EXPERTS, TOPK = 2, 16, 4


def foreign_routes(samples: list[int]) -> np.ndarray:
    """Return routes that differ between samples, positions and layers: [rows, layers, topk]."""
    sample, row, layer, slot = np.ix_(samples, range(6), range(LAYERS), range(TOPK))
    return ((5 * sample + 3 * row + 7 * layer + 4 * slot) % EXPERTS).reshape(-1, LAYERS, TOPK)


def loaded(path: Path, checkpointed: bool, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)
    if checkpointed:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
    return model


def gradients(model: Any, samples: list[int], routed_as: list[int]) -> dict[str, np.ndarray]:
    """Record and replay these samples, and return the live routes and some gradients."""
    tokens = TOKENS[samples]
    with torch.no_grad(), record_routes(model) as recorder:
        model(tokens)
    recorded = recorder.take().numpy()
    routes = foreign_routes(routed_as)
    valid = np.ones(len(routes), dtype=bool)
    with replay_routes(model, routes, valid, layers=(0, 1)):
        model(tokens, labels=tokens).loss.backward()
    found = {"recorded": recorded}
    gate = f"{find_routers(model)[1].path}.weight"
    for name in (gate, "model.layers.0.self_attn.o_proj.weight"):
        grad = model.get_parameter(name).grad
        found[name] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).numpy()
    return found
