"""Weights and optimizer as files of Megatron's distributed format: planned, copied, written, read.

Each part of a write is called by itself, so that ranks learn of a failure between the parts, and so
that the slow one, which touches nothing but host memory and files, may run in a thread.
"""

from __future__ import annotations

import gc
import inspect
import queue
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import common, filesystem_async
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

from moe_replay.megatron.disk import SharedWrite
from moe_replay.megatron.ranks.messages import all_ranks

# 0.19 saves through a package of its own by default, which it does not require; we write in this
# process in any case.
_SAVE_OPTIONS: dict[str, Any] = (
    {"async_strategy": "mcore"}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    else {}
)


class StateWrite:
    """One write of a sharded state into a folder; every rank its shards."""

    def __init__(
        self, state: dict[str, Any], folder: Path, write: SharedWrite, *, checks_layout: bool
    ) -> None:
        """Plan it, and write what all ranks share on the first one; collective.

        ``checks_layout`` has Megatron check that every part is written once, which takes a third of
        the time.
        """
        self._write = write
        strategy: Any = _SaveInThisProcess("torch_dist", 1, thread_count=1)
        strategy.shared_write = write
        if replica_group().size() > 1:
            strategy = FullyParallelSaveStrategyWrapper(strategy, replica_group())
        with ExitStack() as inside:
            # Hide live objects from the collector: the distributed optimizer collects at every
            # save. Whoever has hidden some already wants them to stay so.
            if not gc.get_freeze_count():
                gc.freeze()
                inside.callback(gc.unfreeze)
            # Before the writer starts a process to hold its results.
            inside.enter_context(_replaced(filesystem_async, "_results_queue", queue.Queue()))
            if _HAS_COMMON_FILE:
                # `save` accepts no other strategy for what all ranks share.
                name = "get_default_save_common_strategy"
                ours = partial(_CommonInPart, write)
                inside.enter_context(_replaced(serialization, name, ours))
            self._request = dist_checkpointing.save(
                state,
                str(folder),
                sharded_strategy=strategy,
                validate_access_integrity=checks_layout,
                **_SAVE_OPTIONS,
                async_sharded_save=True,
            )

    def copy(self) -> None:
        """Copy what this rank writes to host memory that nothing else changes."""
        with self._write.part():
            self._files.copy()

    def write(self) -> None:
        """Write this rank's files; not collective, and free of anything that training touches."""
        with self._write.part():
            self._files.write()

    def finish(self) -> None:
        """Tell every rank what failed on any, and write what all files hold; collective.

        Raises:
            CheckpointError: when a part failed.
        """
        self._write.finish()
        # The last one writes the format's name on the first rank alone; `save` does so where it may
        # fail.
        for finalize in self._request.finalize_fns[:-1]:
            finalize()

    @property
    def _files(self) -> _OwnFiles:
        files = self._request.async_fn
        assert isinstance(files, _OwnFiles)
        return files


def read_state(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the sharded ``state`` with what ``folder`` holds; collective."""
    strategy = FullyParallelLoadStrategyWrapper(_LoadInStep(), replica_group())
    return dist_checkpointing.load(state, str(folder), sharded_strategy=strategy)


def replica_group() -> dist.ProcessGroup:
    """Return the ranks that hold the same part of the model, and share its optimizer."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


class _LoadInStep(TorchDistLoadShardedStrategy):
    """Megatron's reader, which lets no rank go on to the exchange while another still reads.

    The exchange is a collective of the device, which would give up on a rank with a slow disk.
    """

    def load(self, *arguments: Any, **named: Any) -> Any:
        loaded = super().load(*arguments, **named)
        all_ranks().barrier()
        return loaded


class _OwnFiles:
    """The files that one rank writes."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def __call__(self) -> None:
        self.write()

    def copy(self) -> None:
        if self._writer.write_buckets:
            self._writer.write_buckets = [
                (file, key, (texts, [(item, _own_copy(tensor)) for item, tensor in tensors]))
                for file, key, (texts, tensors) in self._writer.write_buckets
            ]

    def write(self) -> None:
        writer = self._writer
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


def _own_copy(tensor: torch.Tensor) -> torch.Tensor:
    # On a CPU `to` returns the live tensor, which the next step changes.
    return tensor.clone() if tensor.device.type == "cpu" else tensor.to("cpu")


class _SaveInThisProcess(TorchDistSaveShardedStrategy):
    """Megatron's distributed format, written by the rank itself.

    The stock strategy forks writers and keeps a manager process for their results: unsafe once CUDA
    has started, impossible in a daemon, and a killed trainer leaves the manager behind.
    """

    shared_write: SharedWrite

    def _get_save_and_finalize_callbacks(
        self, writer: Any, save_state_dict_ret: Any, *_async_strategy: Any
    ) -> AsyncRequest:
        finish: Callable[..., None] = writer.finish

        def finish_in_part(*results: Any) -> None:
            with self.shared_write.part():
                finish(*results)

        # Called on the first rank between two collectives.
        writer.finish = finish_in_part

        def finalize() -> None:
            save_state_dict_async_finalize(*save_state_dict_ret)

        return AsyncRequest(_OwnFiles(writer), (), [finalize])


# 0.19 has no file of its own for what all ranks share: it is written with the rest, and heard of
# with it.
_HAS_COMMON_FILE = hasattr(common, "TorchCommonSaveStrategy")
_CommonFile: Any = getattr(common, "TorchCommonSaveStrategy", object)


class _CommonInPart(_CommonFile):
    """Megatron's file of what all ranks share; a failure of the first rank is kept for all."""

    def __init__(self, write: SharedWrite) -> None:
        super().__init__("torch", 1)
        self._write = write

    def save_common(self, common_state_dict: Any, checkpoint_dir: Any) -> None:
        with self._write.part():
            super().save_common(common_state_dict, checkpoint_dir)


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Give a name of one of Megatron's modules another value for the time of the block."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
