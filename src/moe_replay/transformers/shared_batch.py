"""Ranks that share a batch must replay the same routes, or each computes a part of another network.

Under tensor parallelism every rank of a group has the same rows, and runs its own part of each
expert, or its own experts, for all of them; the parts are summed. Routes that differ between two
ranks would give a sum of parts of different experts, without an error anywhere.

In: a model that transformers has distributed, routes. Out: ReplayScopeError on every rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import nn

from moe_replay.errors import ReplayScopeError, UnsupportedError


def require_whole_model(model: nn.Module) -> None:
    """Refuse a model whose layers lie on several ranks, so that no rank has a whole route.

    Raises:
        UnsupportedError: under pipeline parallelism.
    """
    meshes = _meshes(model)
    if meshes is not None and meshes.get_mesh("pp").size() > 1:
        raise UnsupportedError(
            f"{type(model).__name__} is split into {meshes.get_mesh('pp').size()} pipeline stages, so this rank has the "
            "routers of some layers alone, and transformers has no backward pass through stages; use tp_size, ep_size "
            "or fsdp_size of DistributedConfig instead of pp_size"
        )


def require_same_routes(
    model: nn.Module,
    expert_ids: Shaped[np.ndarray, "..."],
    valid: Shaped[np.ndarray, "..."],
    layers: Sequence[int],
) -> None:
    """Compare the routes of all ranks that share a batch with this one; collective over them.

    It takes routes as they were given, before anything is checked.

    Raises:
        ReplayScopeError: on every rank of the group, when they differ.
    """
    meshes = _meshes(model)
    if meshes is None or meshes.get_mesh("tp").size() == 1:
        return
    mesh = meshes.get_mesh("tp")
    mine = torch.tensor(_digest(expert_ids, valid, layers), dtype=torch.uint8).to(mesh.device_type)
    found = [torch.empty_like(mine) for _ in range(mesh.size())]
    dist.all_gather(found, mine, group=mesh.get_group())
    ranks = dist.get_process_group_ranks(mesh.get_group())
    odd = [rank for rank, one in zip(ranks, found, strict=True) if not torch.equal(one, found[0])]
    if odd:
        raise ReplayScopeError(
            f"ranks {ranks} share one batch under tensor parallelism, but the routes of ranks {odd} are not those of rank "
            f"{ranks[0]}; each would run its part of other experts: give every rank of the group the same samples and "
            "their routes, in the same order"
        )


def _meshes(model: nn.Module) -> Any:
    """Return the device meshes that transformers keeps on a model that it distributed, or None."""
    # The model may be wrapped, and a wrapper's __getattr__ may ask the model.
    found = (vars(module).get("_mesh_manager") for module in model.modules())
    return next((meshes for meshes in found if meshes is not None), None)


def _digest(expert_ids: np.ndarray, valid: np.ndarray, layers: Sequence[int]) -> list[int]:
    """Return 32 bytes that do not depend on widths of integers, nor on ids of rows without routes.

    Routes of a wrong form are told from others by their form alone; the scope refuses them after
    this, on every rank, so that none waits for another.
    """
    holds_ids = expert_ids.ndim == 3 and expert_ids.dtype.kind in "iu" and valid.dtype == np.bool_
    form = (holds_ids, expert_ids.shape, valid.shape, tuple(layers))
    seen = hashlib.sha256(repr(form).encode())
    if holds_ids:
        if valid.shape == expert_ids.shape[:1]:
            expert_ids = np.where(valid[:, None, None], expert_ids, 0)
        # Routes of 32k tokens in 48 layers are 98 MB as int64.
        is_narrow = not expert_ids.size or (expert_ids.min() >= 0 and expert_ids.max() < 1 << 16)
        seen.update(valid.tobytes())
        seen.update(expert_ids.astype(np.uint16 if is_narrow else np.int64).tobytes())
    return list(seen.digest())
