"""The ranks that sample one rollout together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from moe_replay.megatron.ranks.messages import HostGroup, all_ranks, forget_groups, wait_at_most
from moe_replay.recipe.recipe import ProcessSpec


@contextmanager
def joined_ranks(
    process: ProcessSpec, *, wait_limit: timedelta
) -> Iterator[tuple[HostGroup, torch.device]]:
    """Join the other processes that torchrun started; without torchrun, run alone and open no port.

    An existing default process group is used as it is. Ranks wait for each other for
    ``wait_limit``.
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
            timeout=None if cuda else wait_limit,
        )
    try:
        wait_at_most(wait_limit)
        yield all_ranks(), device
    finally:
        if owned:
            forget_groups()
            dist.destroy_process_group()
