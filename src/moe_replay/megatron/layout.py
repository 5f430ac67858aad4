"""Megatron's global parallel state, set up for a layout: process groups and RNG streams."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from moe_replay.errors import UnsupportedError
from moe_replay.megatron.ranks.messages import WAIT_LIMIT, forget_groups, wait_at_most
from moe_replay.megatron.upstream.gloo import one_gloo_device
from moe_replay.megatron.upstream.warnings import ignore_upstream_warnings
from moe_replay.recipe.sections.training import ParallelLayout


def initialize(
    layout: ParallelLayout,
    *,
    from_environment: bool = False,
    local_rank: int = 0,
    seed: int = 0,
    wait_limit: timedelta = WAIT_LIMIT,
) -> None:
    """Set up torch.distributed, Megatron's process groups and its RNG streams.

    An existing default process group is used as it is. Otherwise `from_environment` decides: True
    reads the rendezvous that torchrun puts there, False makes a world of this process alone,
    without opening a port. The backend is nccl with CUDA, where `local_rank` picks the device, and
    gloo without. Ranks wait for each other for ``wait_limit`` in messages between hosts.

    Raises:
        UnsupportedError: the world does not hold a whole number of copies of the model.
    """
    ignore_upstream_warnings()
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    with one_gloo_device():
        _make_groups(layout, from_environment=from_environment, wait_limit=wait_limit)
    model_parallel_cuda_manual_seed(seed)


def _make_groups(layout: ParallelLayout, *, from_environment: bool, wait_limit: timedelta) -> None:
    if not dist.is_initialized():
        # A gloo world carries the messages between ranks too; a device's world keeps its own limit.
        backend, timeout = ("nccl", None) if torch.cuda.is_available() else ("gloo", wait_limit)
        if from_environment:
            dist.init_process_group(backend, init_method="env://", timeout=timeout)
        else:
            dist.init_process_group(
                backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
            )
    wait_at_most(wait_limit)
    world = dist.get_world_size()
    for size, what in (
        (layout.model_parallel_size, "tensor x pipeline x context"),
        (layout.expert_parallel_size, "expert tensor x expert x pipeline"),
    ):
        if world % size:
            raise UnsupportedError(
                f"{world} ranks do not divide into copies of {size} ranks ({what} parallelism of "
                f"{layout.describe()}); start a multiple of {size} ranks, or lower a degree"
            )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        context_parallel_size=layout.context_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
    )


def shutdown() -> None:
    """Undo `initialize`: drop Megatron's groups and the default process group."""
    parallel_state.destroy_model_parallel()
    forget_groups()
    if dist.is_initialized():
        dist.destroy_process_group()
