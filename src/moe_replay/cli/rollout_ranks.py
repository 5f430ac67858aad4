"""The ranks that sample one rollout together.

In: a process as torchrun started it. Out: `Ranks`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from moe_replay.megatron.ranks.messages import WAIT_LIMIT, HostGroup, all_ranks, forget_groups
from moe_replay.recipe.recipe import ProcessSpec

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """The processes of this command, and how they exchange values."""

    rank: int
    """Index of this process."""
    count: int
    """Number of processes."""
    device: torch.device
    """Device of this process's engine."""
    host: HostGroup
    """Host group for exchanging values."""

    def gather(self, value: T) -> list[T]:
        """Return the value of every rank, in rank order; collective."""
        return self.host.gather(value)

    def wait(self) -> None:
        """Wait for all ranks; collective."""
        self.host.barrier()


@contextmanager
def joined_ranks(process: ProcessSpec) -> Iterator[Ranks]:
    """Join the other processes that torchrun started; without torchrun, run alone and open no port.

    An existing default process group is used as it is.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", process.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    owned = process.launched_by_torchrun and not dist.is_initialized()
    if owned:
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            init_method="env://",
            timeout=None if cuda else WAIT_LIMIT,
        )
    host = all_ranks()
    try:
        yield Ranks(rank=host.rank, count=host.size, device=device, host=host)
    finally:
        if owned:
            forget_groups()
            dist.destroy_process_group()
