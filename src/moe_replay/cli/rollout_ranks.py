"""The ranks that sample one rollout together: who they are, and the little that they tell one another.

In: a process as torchrun started it. Out: `Ranks`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from moe_replay.grpo.config import ProcessSpec
from moe_replay.sync.messages import gather_json

# The first rank to finish waits for the last one, however long its completions are.
_WAIT = timedelta(days=365)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """The processes of this command."""

    rank: int
    """Which of them this is."""
    count: int
    """How many there are."""
    device: torch.device
    """Where the engine of this process runs."""
    _group: dist.ProcessGroup | None

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's ``value``, which JSON can hold, in their order; collective."""
        if self._group is None:
            return [value]
        return gather_json(value, self._group, device=torch.device("cpu"))

    def wait(self) -> None:
        """Return when all ranks are here; collective."""
        self.gather(None)


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
        dist.init_process_group("nccl" if cuda else "gloo", init_method="env://")
    try:
        if dist.is_initialized():
            group = dist.new_group(backend="gloo", timeout=_WAIT)
            assert isinstance(group, dist.ProcessGroup), "this rank is in the group of all ranks"
            yield Ranks(
                rank=dist.get_rank(), count=dist.get_world_size(), device=device, _group=group
            )
        else:
            yield Ranks(rank=0, count=1, device=device, _group=None)
    finally:
        if owned:
            dist.destroy_process_group()
