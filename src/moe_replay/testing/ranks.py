"""Run one function on several gloo ranks of forked processes, in well under a second.

Forking after Megatron is imported saves the seconds that every spawned interpreter pays for
imports, and a process of its own keeps Megatron's global state from leaking between tests, so it is
worth it for one rank too. Never use it after CUDA was started.

In: a function. Out: what it returned on each rank.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle  # noqa: TID251 - between a process and its own forked children
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class RankFailure(RuntimeError):
    """A rank died, hung, or raised something that cannot be sent to the parent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Report:
    """What a rank sends to the parent."""

    value: Any = None
    error: BaseException | None = None
    trace: str = ""
    time_s: float = 0.0


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 600
) -> list[Any]:
    """Call `fn(*args)` on every rank of a fresh gloo world and return the results in rank order.

    The default process group exists when `fn` starts; `torch.distributed.get_rank()` tells the
    rank. `fn` and `args` are inherited by the fork and may be anything; a result is pickled,
    tensors by value. The first exception of a rank is raised here with the rank's traceback as a
    note, and the other ranks are killed.

    Examples:
        >>> run_ranks(lambda: torch.distributed.get_rank() * 10, 2)
        [0, 10]

    Raises:
        TimeoutError: a rank was still running after `timeout_s`; the message holds the ranks'
            stacks.
        RankFailure: a rank died without a result.
    """
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="ranks-") as directory:
        folder = Path(directory)
        pipes = [fork.Pipe(duplex=False) for _ in range(world_size)]
        children = [
            fork.Process(
                target=_run_rank,
                args=(rank, world_size, folder, pipes[rank][1], fn, args),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for child, (_, sender) in zip(children, pipes, strict=True):
            child.start()
            sender.close()
        try:
            return _collect([receiver for receiver, _ in pipes], children, folder, timeout_s)
        finally:
            for child, (receiver, _) in zip(children, pipes, strict=True):
                if child.is_alive():
                    child.kill()
                child.join()
                receiver.close()


def _collect(
    receivers: list[Connection], children: list[Any], folder: Path, timeout_s: float
) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    while len(results) < len(receivers):
        pending = {receivers[rank]: rank for rank in range(len(receivers)) if rank not in results}
        ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            stacks = _stacks(folder, {rank: children[rank] for rank in pending.values()})
            raise TimeoutError(
                f"ranks {sorted(pending.values())} of {len(receivers)} still ran after {timeout_s} s. "
                f"Usually one rank skipped a collective that the others wait in.\n{stacks}"
            )
        reports = {
            rank: _report(receiver, rank, children[rank])
            for receiver, rank in pending.items()
            if receiver in ready
        }
        # The rank that failed first is the cause; the others fail because they lost it.
        failed = min((r for r in reports.values() if r.error), key=lambda r: r.time_s, default=None)
        if failed is not None and failed.error is not None:
            raise failed.error
        results |= {rank: report.value for rank, report in reports.items()}
    return [results[rank] for rank in range(len(receivers))]


def _report(receiver: Connection, rank: int, child: Any) -> _Report:
    try:
        report: _Report = pickle.loads(receiver.recv_bytes())
    except EOFError:
        child.join()
        error = RankFailure(
            f"rank {rank} died with exit code {child.exitcode} and returned nothing; a negative code is "
            "the signal that killed it (-9 often means out of memory)"
        )
        # Before everything else: nothing that another rank raises kills this one.
        return _Report(error=error)
    if report.error is not None:
        report.error.add_note(f"raised on rank {rank}:\n{report.trace}")
    return report


def _stacks(folder: Path, hung: dict[int, Any]) -> str:
    for child in hung.values():
        os.kill(child.pid, signal.SIGUSR1)
    deadline = time.monotonic() + 1.0
    files = {rank: folder / f"stack-{rank}" for rank in hung}
    while time.monotonic() < deadline and not all(
        f.exists() and f.stat().st_size for f in files.values()
    ):
        time.sleep(0.01)
    return "\n".join(
        f"rank {rank}:\n{f.read_text() if f.exists() else '?'}" for rank, f in files.items()
    )


def _run_rank(
    rank: int,
    world_size: int,
    folder: Path,
    sender: Connection,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    # First of all: the parent's OpenMP threads do not exist after a fork, waiting for them hangs.
    torch.set_num_threads(1)
    # What the parent made lives as long as this process: a collection that looks through all of it
    # takes a third of the time of a short run, and copies its pages.
    gc.freeze()
    with (folder / f"stack-{rank}").open("w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=False)
        report = _Report()
        try:
            store = dist.FileStore(str(folder / "store"), world_size)
            dist.init_process_group(
                "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(hours=1)
            )
            report = _Report(value=fn(*args))
        except BaseException as raised:  # noqa: BLE001 - the seam: whatever a rank raises is sent to the parent
            report = _Report(error=raised, trace=traceback.format_exc(), time_s=time.monotonic())
        sender.send_bytes(_pickled(report))
        sender.close()
        # A rank that left would break collectives that others are still in; the parent kills all
        # together.
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(0)


def _pickled(report: _Report) -> bytes:
    try:
        message = pickle.dumps(report)
        pickle.loads(message)
        return message
    except Exception as reason:  # noqa: BLE001 - the seam: pickling runs arbitrary code of the value
        error = report.error
        what = f"returned a {type(report.value).__name__}" if error is None else f"raised {error!r}"
        failure = RankFailure(f"the rank {what}, which cannot be pickled: {reason!r}")
        return pickle.dumps(_Report(error=failure, trace=report.trace, time_s=time.monotonic()))
