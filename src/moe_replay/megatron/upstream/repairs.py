"""Which repairs an unmodified Megatron-Core needs on this machine, each keyed to what is missing.

In: nothing. Out: Megatron modules that run here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moe_replay.megatron.upstream import missing_packages
from moe_replay.megatron.upstream import no_cuda as cpu


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """One cause, and what is done about it."""

    missing: str
    """What Megatron-Core counts on."""
    is_there: Callable[[], bool]
    """Whether this machine has it; asked on import, in the order of `REPAIRS`."""
    install: Callable[[], None]
    """Repairs Megatron-Core where it is missing; calling it twice changes nothing more."""


REPAIRS = (
    Repair(
        missing="Triton",
        is_there=missing_packages.has_triton,
        install=missing_packages.replace_paged_stash,
    ),
    # Before anything imports Megatron-Core; the repairs below do.
    Repair(missing="CUDA", is_there=lambda: torch.cuda.is_available(), install=cpu.install),
    Repair(
        missing="Transformer Engine",
        is_there=missing_packages.has_transformer_engine,
        install=missing_packages.replace_transformer_engine,
    ),
    Repair(
        missing="an Adam of Transformer Engine or Apex",
        is_there=missing_packages.has_fused_adam,
        install=missing_packages.keep_torch_adam_state,
    ),
)


def install() -> tuple[str, ...]:
    """Install every repair whose cause is on this machine, and no other; return the causes."""
    found = []
    for repair in REPAIRS:
        if not repair.is_there():
            repair.install()
            found.append(repair.missing)
    return tuple(found)
