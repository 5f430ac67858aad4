"""Checkpoints to resume from: Megatron's distributed format, made visible only when they are whole.

A checkpoint is written into a folder whose name no reader looks for, flushed to the disk, and renamed; a process that
is killed at any moment leaves either a whole checkpoint or an ignored folder behind.

In: an actor and the loop's own position. Out: folders ``step-000040``. Called by: grpo.loop.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import queue
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.state_dict_saver import (
    save_state_dict_async_finalize,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
)

from moe_replay.errors import CheckpointError
from moe_replay.megatron.actor import MegatronActor
from moe_replay.megatron.model import unwrap
from moe_replay.megatron.optimizer_state import with_one_step
from moe_replay.megatron.upstream_warnings import quiet_megatron

_WHOLE = re.compile(r"step-(\d{6,})")
_POSITION_FILE = "position.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPosition:
    """Where a run stands after a step; with the weights and the optimizer, all that a resumed run needs."""

    step: int
    """Finished steps."""
    policy_version: int
    """Weight pushes that the engine has received."""
    next_prompt: int
    """Position of the next prompt in the prompt source."""
    fingerprint: str
    """`Recipe.fingerprint()` of the run."""
    scheduler: Mapping[str, Any]
    """State of the learning-rate schedule."""


class CheckpointFolder:
    """The checkpoints of one run."""

    def __init__(self, path: Path, *, save_total_limit: int) -> None:
        """Use ``path``, keeping the newest ``save_total_limit`` checkpoints."""
        self.path = path
        self.save_total_limit = save_total_limit
        self._layout_is_checked = False

    def steps(self) -> list[int]:
        """Return the steps that have a whole checkpoint, oldest first."""
        if not self.path.is_dir():
            return []
        matches = (_WHOLE.fullmatch(entry.name) for entry in self.path.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    @quiet_megatron()
    def save(self, actor: MegatronActor, position: RunPosition) -> None:
        """Write the checkpoint of ``position.step``; every rank calls this together.

        Raises:
            CheckpointError: when the disk is full or cannot be written; the previous checkpoint stays whole.
        """
        unfinished = self.path / f"unfinished-step-{position.step:06d}"
        finished = self.path / f"step-{position.step:06d}"
        with self._explained(finished):
            if _is_first_rank():
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir(parents=True)
            dist.barrier()
            strategy: Any = _SaveInThisProcess("torch_dist", 1, thread_count=1)
            if _replica_group().size() > 1:
                strategy = FullyParallelSaveStrategyWrapper(strategy, _replica_group())
            with _results_in_this_process(), _nothing_to_collect():
                dist_checkpointing.save(
                    _sharded_state(actor, is_loading=False),
                    str(unfinished),
                    sharded_strategy=strategy,
                    # Which rank writes what does not change during a run, and checking it takes a third of the time.
                    validate_access_integrity=not self._layout_is_checked,
                )
            self._layout_is_checked = True
            if _is_first_rank():
                (unfinished / _POSITION_FILE).write_text(json.dumps(asdict(position), indent=1))
                _flush_folder(unfinished)
                shutil.rmtree(finished, ignore_errors=True)
                unfinished.rename(finished)
                _flush_folder(self.path)
                self._forget_old()
            dist.barrier()

    def position(self, step: int) -> RunPosition:
        """Read where the run stood at ``step``, without loading any weight."""
        path = self.path / f"step-{step:06d}" / _POSITION_FILE
        try:
            return RunPosition(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error}); the checkpoint was altered after it was written: remove its folder "
                "to resume from the one before"
            ) from error

    @quiet_megatron()
    def load(self, actor: MegatronActor, step: int) -> RunPosition:
        """Load weights, optimizer and schedule of ``step`` into ``actor``; every rank calls this together.

        Raises:
            CheckpointError: when the checkpoint is not whole or belongs to another model.
        """
        folder = self.path / f"step-{step:06d}"
        position = self.position(step)
        strategy = FullyParallelLoadStrategyWrapper(
            TorchDistLoadShardedStrategy(), _replica_group()
        )
        try:
            state = dist_checkpointing.load(
                _sharded_state(actor, is_loading=True), str(folder), sharded_strategy=strategy
            )
        except (
            OSError,
            RuntimeError,
            KeyError,
            dist_checkpointing.core.CheckpointingException,
        ) as error:
            raise CheckpointError(
                f"{folder} cannot be loaded: {error}; it was altered, or written for another model or layout"
            ) from error
        for number, module in enumerate(actor.modules):
            unwrap(module).load_state_dict(state[f"model{number}"], strict=True)
        actor.optimizer.load_state_dict(state["optimizer"])
        actor.scheduler.load_state_dict(dict(position.scheduler))
        return position

    def remove_all(self) -> None:
        """Delete every checkpoint, whole or unfinished."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _forget_old(self) -> None:
        for step in self.steps()[: -self.save_total_limit]:
            shutil.rmtree(self.path / f"step-{step:06d}")

    @contextmanager
    def _explained(self, finished: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            free = shutil.disk_usage(self.path if self.path.is_dir() else self.path.parent).free
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            cause = (
                f"the disk is full ({free / 2**20:.0f} MiB free)" if full else "the disk refused"
            )
            kept = self.steps()
            raise CheckpointError(
                f"writing {finished} failed: {error}; {cause}. "
                f"{f'Step {kept[-1]} is the newest whole checkpoint' if kept else 'There is no checkpoint yet'}: free "
                "some space, or lower checkpoint.save_total_limit, and start the same command again to resume"
            ) from error


def _is_first_rank() -> bool:
    return dist.get_rank() == 0


def _replica_group() -> dist.ProcessGroup:
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _sharded_state(actor: MegatronActor, *, is_loading: bool) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": _replica_group(),
    }
    state: dict[str, Any] = {
        f"model{number}": unwrap(module).sharded_state_dict(metadata=metadata)
        for number, module in enumerate(actor.modules)
    }
    state["optimizer"] = with_one_step(
        actor.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    )
    return state


class _SaveInThisProcess(TorchDistSaveShardedStrategy):
    """Megatron's distributed format, written by the rank itself.

    The stock strategy forks writers and keeps a manager process for their results: unsafe once CUDA has started,
    impossible in a daemon, and a killed trainer leaves the manager behind.
    """

    def _get_save_and_finalize_callbacks(
        self, writer: Any, save_state_dict_ret: Any, *_async_strategy: Any
    ) -> AsyncRequest:
        def write() -> None:
            if not writer.write_buckets:
                return
            transforms = [writer.transforms] if hasattr(writer, "transforms") else []
            buckets = writer.preload_tensors(writer.write_buckets, non_blocking=False)
            written: dict[int, Any] = {}
            for number, bucket in enumerate(buckets):
                results: queue.Queue[Any] = queue.Queue()
                pending: queue.Queue[Any] = queue.Queue()
                pending.put(number)
                writer.write_preloaded_data(
                    transforms, number, bucket, results, pending, use_fsync=True
                )
                _, written[number] = results.get()
                if isinstance(written[number], Exception):
                    raise written[number]
            writer.results_queue.put(written)

        def finalize() -> None:
            save_state_dict_async_finalize(*save_state_dict_ret)

        return AsyncRequest(write, (), [finalize])


@contextmanager
def _results_in_this_process() -> Iterator[None]:
    """Hand the writer a plain queue, before it starts a process to hold one."""
    before = filesystem_async._results_queue
    filesystem_async._results_queue = queue.Queue()
    try:
        yield
    finally:
        filesystem_async._results_queue = before


@contextmanager
def _nothing_to_collect() -> Iterator[None]:
    """Hide what exists from the collector: the distributed optimizer forces a full collection at every save."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _flush_folder(folder: Path) -> None:
    """Force the folder's files and names to the disk, so that the rename cannot overtake them."""
    for path in [*folder.iterdir(), folder] if folder.is_dir() else []:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
