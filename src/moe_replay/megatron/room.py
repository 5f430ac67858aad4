"""Whether a disk has room for a checkpoint, known before a byte of it is written."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.core.optimizer import MegatronOptimizer

from moe_replay.errors import CheckpointError
from moe_replay.megatron.ranks.messages import all_ranks

# Below this part of what is expected the disk is called full; file systems that compress need less.
_ENOUGH = 0.9
_ADAM_BYTES = 12
"""Bytes of a parameter's float32 main weight and moments."""


def disk_bytes(folder: Path) -> int:
    """Return what the files of a folder take on their disk."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def expected_bytes(modules: Sequence[torch.nn.Module], optimizer: MegatronOptimizer) -> int:
    """Return about what a checkpoint of this run will take; collective.

    Each parameter once, as the optimizer shares them out over all ranks: its weight, and main
    weight and moments in float32. What tensor parallelism copies (norms, routers) counts as often
    as it is held, which is little. Example: 30.5 B parameters in bfloat16 take 14 bytes each,
    427 GB.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    inner = [part.optimizer for part in parts if getattr(part, "optimizer", None) is not None]
    own = sum(p.numel() for each in inner for group in each.param_groups for p in group["params"])
    weight = next(parameter.element_size() for parameter in modules[0].parameters())
    return sum(all_ranks().gather(own)) * (weight + _ADAM_BYTES)


def check_room(folder: Path, needed: int, *, what: str) -> None:
    """Raise unless the disk of ``folder``, which need not exist, has room for ``needed`` bytes.

    ``what`` says where the number comes from.

    Raises:
        CheckpointError: when it does not.
    """
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if free < _ENOUGH * needed:
        raise CheckpointError(
            f"{folder}: the disk is full for a checkpoint: {free / 2**20:.0f} MiB are free, expected {needed / 2**20:.0f} MiB, "
            f"{what}"
        )
