"""One vLLM over several ranks of the trainer: each holds a shard, and all take the same steps.

Consecutive ranks form an engine. Every rank has a scheduler of its own; they stay together because
each is given the requests of all ranks in the same order, and draws the same tokens from the same
gathered logits.

In: the trainer's process group, requests of this rank. Out: an executor class, requests of all
ranks of the engine.
"""

from __future__ import annotations

import secrets
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from moe_replay.errors import EngineError, RecipeError

T = TypeVar("T")


def check_ranks(tensor_parallel_size: int, world_size: int | None = None) -> None:
    """Raise `RecipeError` unless the ranks of this run can be split into engines of that many.

    ``world_size`` is their number if the run has not started.
    """
    if world_size is None:
        world_size = dist.get_world_size() if dist.is_initialized() else 1
    if tensor_parallel_size < 1 or world_size % tensor_parallel_size:
        raise RecipeError(
            f"rollout.tensor_parallel_size is {tensor_parallel_size}, expected a divisor of the "
            f"{world_size} processes of this run, whose consecutive ranks share an engine"
        )


def executor_of_ranks() -> type:
    """Return the vLLM executor that runs one shard, in this process; collective over all ranks."""
    # Shards on one machine find each other's memory by a name, which no other engine may have.
    number = torch.tensor([secrets.randbits(48)], dtype=torch.int64, device=_device())
    dist.broadcast(number, src=0)
    # vLLM takes the trainer's process group, so nothing is ever opened at this address.
    return own_executor(f"env://moe-replay:{int(number)}", dist.get_rank())


def own_executor(address: str | None = None, rank: int = 0) -> type:
    """Return the vLLM executor that runs a model, or one rank's shard of it, in this process.

    It takes the GPU that this process has chosen; vLLM would use the first one in each of the
    trainer's processes.
    """
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    local_rank = torch.cuda.current_device() if torch.cuda.is_available() else rank

    class OwnExecutor(UniProcExecutor):
        def _distributed_args(self) -> tuple[str, int, int]:
            return address or super()._distributed_args()[0], rank, local_rank

    return OwnExecutor


def failure_of_ranks(failure: Exception | None) -> Exception | None:
    """Return why a push failed on any rank of this engine; collective over its ranks.

    A rank gets its own exception where it has one. Weights of two policies in the shards of one
    model are no model, so what one rank could not load no rank has.
    """
    text = "" if failure is None else f"{type(failure).__name__}: {failure}"
    texts = of_ranks(text)
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text]
    if failure is not None or not failed:
        return failure
    return EngineError(
        f"a weight push failed on {len(failed)} of the {len(texts)} ranks that share this vLLM, so none "
        f"of them has it: {'; '.join(failed)}"
    )


def own_rank() -> int:
    """Return the index of this rank within its engine."""
    from vllm.distributed.parallel_state import get_tp_group

    return get_tp_group().rank_in_group


def of_ranks(mine: T) -> list[T]:
    """Return the values of every rank of this engine, in rank order; collective over them."""
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group().cpu_group
    everyone: list[Any] = [mine] * group.size()
    # Threads may call an engine of one rank at the same time.
    if len(everyone) > 1:
        dist.all_gather_object(everyone, mine, group=group)
    return everyone


def _device() -> torch.device:
    """Return where the trainer's process group can send from."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
