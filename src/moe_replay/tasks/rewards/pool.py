"""Several processes that score completions by one reward function at once.

Each is a reward process of its own: what hangs or ends in one is replaced there, and the others go
on. Parts of a batch go to whichever process is free; which one that is changes no score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from queue import SimpleQueue
from typing import Any

from moe_replay.tasks.rewards.batch import Batch, Rows
from moe_replay.tasks.rewards.client import Answer, Failure, RewardProcess
from moe_replay.tasks.rewards.functions import Signature

_PARTS_EACH = 4
"""Parts of a batch for each process, so that none waits long for another."""
_LOOK_S = 0.2
"""Interval at which an interrupted pool looks for what still runs."""


class RewardPool:
    """The processes of one function; they start with the first batch, and end with `close`."""

    def __init__(
        self, function: Mapping[str, Any], num_workers: int, folders: Sequence[str]
    ) -> None:
        """Take a function as `RewardProcess` does."""
        self._processes = [RewardProcess([function], folders) for _ in range(num_workers)]
        self._free: SimpleQueue[RewardProcess] = SimpleQueue()
        for process in self._processes:
            self._free.put(process)
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="reward")
        self._running: list[Future[Answer | Failure]] = []

    def start(
        self, batch: Batch, rows: Rows, signature: Signature
    ) -> list[tuple[Rows, Future[Answer | Failure]]]:
        """Have completions scored in parts; return each with what will come of it."""
        parts = batch.parts(rows, _PARTS_EACH * len(self._processes))
        requests = [batch.to_plain({0: (signature, part)}) for part in parts]
        self._running = [self._threads.submit(self._score, *request) for request in requests]
        return list(zip(parts, self._running, strict=True))

    def score(self, batch: Batch, rows: Rows, signature: Signature) -> Answer | Failure:
        """Score completions in one call."""
        return self._score(*batch.to_plain({0: (signature, rows)}))

    def _score(self, request: Mapping[str, Any], blob: bytes) -> Answer | Failure:
        process = self._free.get()
        try:
            (outcome,) = process.score(request, blob, [0])
        finally:
            self._free.put(process)
        return outcome

    def interrupt(self) -> None:
        """End what is running, and the processes with it; the next batch starts new ones."""
        for future in self._running:
            future.cancel()
        was_running = False
        # Again and again: a process may just be starting.
        while wait(self._running, timeout=_LOOK_S).not_done:
            was_running = True
            for process in self._processes:
                process.interrupt()
        if was_running:
            # Idle ones were killed, too, which the next batch would take for a crash.
            for process in self._processes:
                process.close()

    def close(self) -> None:
        """End the processes and all of their children."""
        self.interrupt()
        self._threads.shutdown()
        for process in self._processes:
            process.close()


def wait_until(
    stops: Callable[[int, Answer | Failure], bool], futures: Mapping[Future[Answer | Failure], int]
) -> None:
    """Wait for calls of functions, by number, until all are over or one ``stops``."""
    running = dict(futures)
    while running:
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        if any(stops(running.pop(each), each.result()) for each in done):
            return
