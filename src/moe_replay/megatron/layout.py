"""How the ranks are divided, and Megatron's global parallel state set up accordingly.

In: a `ParallelLayout`. Out: initialised process groups and RNG streams.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from moe_replay.errors import UnsupportedError
from moe_replay.megatron.ranks.messages import WAIT_LIMIT, all_ranks, forget_groups
from moe_replay.megatron.upstream.warnings import ignore_upstream_warnings


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelLayout:
    """Degrees of model parallelism; data parallelism is what is left of the world."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each dense matrix; above 1 with sequence parallelism."""
    pipeline_model_parallel_size: int = 1
    """Stages that the layers are dealt over."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks a pipeline rank; None without interleaving."""
    context_parallel_size: int = 1
    """Ranks that share each sequence, zigzag."""
    expert_model_parallel_size: int = 1
    """Ranks that the experts of a layer are dealt over."""
    expert_tensor_parallel_size: int | None = None
    """None: the same as `tensor_model_parallel_size`."""
    num_layers_in_first_pipeline_stage: int | None = None
    """None: the first stage has as many layers as the others."""
    num_layers_in_last_pipeline_stage: int | None = None
    """None: the last stage has as many layers as the others."""
    pipeline_model_parallel_layout: str | None = None
    """Megatron's string of what each stage and chunk holds, such as ``Et*3|t*4|tL``; None deals layers evenly."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            size = getattr(self, name)
            if isinstance(size, int) and size < 1:
                raise UnsupportedError(f"{name} = {size}; a degree of parallelism is at least 1")
        if (
            self.virtual_pipeline_model_parallel_size is not None
            and self.pipeline_model_parallel_size == 1
        ):
            raise UnsupportedError(
                f"virtual_pipeline_model_parallel_size = {self.virtual_pipeline_model_parallel_size} needs "
                "pipeline_model_parallel_size > 1"
            )

    def describe(self) -> str:
        """Return the degrees above 1 in words, such as ``tensor 2, pipeline 2 x 2 chunks``."""
        words = []
        for size, word in (
            (self.tensor_model_parallel_size, "tensor"),
            (self.pipeline_model_parallel_size, "pipeline"),
            (self.context_parallel_size, "context"),
            (self.expert_model_parallel_size, "expert"),
        ):
            if size > 1:
                words.append(f"{word} {size}")
            if size > 1 and word == "pipeline" and self.virtual_pipeline_model_parallel_size:
                words[-1] += f" x {self.virtual_pipeline_model_parallel_size} chunks"
        if self.expert_tensor_parallel_size is not None:
            words.append(f"expert tensor {self.expert_tensor_parallel_size}")
        return ", ".join(words) or "no model parallelism"

    @property
    def model_parallel_size(self) -> int:
        """Ranks that one copy of the dense layers takes, context parallelism included."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )

    @property
    def expert_parallel_size(self) -> int:
        """Ranks that one copy of the expert layers takes."""
        expert_tensor = self.expert_tensor_parallel_size or self.tensor_model_parallel_size
        return expert_tensor * self.expert_model_parallel_size * self.pipeline_model_parallel_size


def initialize(
    layout: ParallelLayout,
    *,
    backend: str | None = None,
    from_environment: bool = False,
    local_rank: int = 0,
    seed: int = 0,
) -> None:
    """Set up torch.distributed, Megatron's process groups and its RNG streams.

    An existing default process group is used as it is. Otherwise `from_environment` decides: True reads the
    rendezvous that torchrun puts there, False makes a world of this process alone, without opening a port.
    `backend` defaults to nccl with CUDA and to gloo without. `local_rank` picks the CUDA device.

    Raises:
        UnsupportedError: the world does not hold a whole number of copies of the model.
    """
    ignore_upstream_warnings()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        backend = backend or ("nccl" if cuda else "gloo")
        # A gloo world carries the messages between ranks too; a device's world keeps its own limit.
        timeout = WAIT_LIMIT if backend == "gloo" else None
        if from_environment:
            dist.init_process_group(backend, init_method="env://", timeout=timeout)
        else:
            dist.init_process_group(
                backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
            )
    all_ranks()
    world = dist.get_world_size()
    for size, what in (
        (layout.model_parallel_size, "tensor x pipeline x context"),
        (layout.expert_parallel_size, "expert tensor x expert x pipeline"),
    ):
        if world % size:
            raise UnsupportedError(
                f"{world} ranks do not divide into copies of {size} ranks ({what} parallelism of {layout}); "
                f"start a multiple of {size} ranks, or lower a degree"
            )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        context_parallel_size=layout.context_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
    )
    model_parallel_cuda_manual_seed(seed)


def shutdown() -> None:
    """Undo `initialize`: drop Megatron's groups and the default process group."""
    parallel_state.destroy_model_parallel()
    forget_groups()
    if dist.is_initialized():
        dist.destroy_process_group()
