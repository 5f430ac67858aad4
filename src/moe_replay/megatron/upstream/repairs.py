"""Which repairs an unmodified Megatron-Core needs on this machine, by what is missing."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch

from moe_replay.megatron.upstream import host_paths, no_cuda
from moe_replay.megatron.upstream import missing_packages as packages

REPAIRS: dict[str, tuple[Callable[[], bool], Callable[[], None]]] = {
    "Triton": (lambda: find_spec("triton") is not None, packages.replace_paged_stash),
    # Before anything imports Megatron-Core; the repairs below do.
    "CUDA": (lambda: torch.cuda.is_available(), no_cuda.install),
    "Transformer Engine": (packages.has_transformer_engine, packages.replace_transformer_engine),
    "an Adam of Transformer Engine or Apex": (
        packages.has_fused_adam,
        packages.keep_torch_adam_state,
    ),
    "kernels for CUDA": (lambda: torch.cuda.is_available(), host_paths.install),
}
"""What Megatron-Core counts on -> whether this machine has it, and what to do where it is missing.

Asked in this order on import; a repair that is called twice changes nothing more.
"""


def install() -> tuple[str, ...]:
    """Install every repair whose cause is on this machine, and no other; return the causes."""
    found = []
    for missing, (is_there, repair) in REPAIRS.items():
        if not is_there():
            repair()
            found.append(missing)
    return tuple(found)
