"""The ranks that sample one rollout together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from moe_replay.megatron.ranks.messages import WAIT_LIMIT, HostGroup, all_ranks, forget_groups
from moe_replay.recipe.recipe import ProcessSpec


@contextmanager
def joined_ranks(process: ProcessSpec) -> Iterator[tuple[HostGroup, torch.device]]:
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
    try:
        yield all_ranks(), device
    finally:
        if owned:
            forget_groups()
            dist.destroy_process_group()
