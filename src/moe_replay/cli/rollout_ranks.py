"""The ranks that sample one rollout together: who they are, and the little that they tell one another.

In: a process as torchrun started it. Out: `Ranks`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from moe_replay.megatron.ranks.messages import WAIT_LIMIT, HostGroup, all_ranks, forget_groups
from moe_replay.recipe.recipe import ProcessSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """The processes of this command."""

    rank: int
    """Which of them this is."""
    count: int
    """How many there are."""
    device: torch.device
    """Where the engine of this process runs."""
    host: HostGroup
    """How they talk."""

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's ``value`` in their order; collective."""
        return self.host.gather(value)

    def wait(self) -> None:
        """Return when all ranks are here; collective."""
        self.host.barrier()


@contextmanager
def joined_ranks(process: ProcessSpec) -> Iterator[Ranks]:
    """Join the other processes that torchrun has started; alone, without opening a port, where there are none.

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
