"""Parts of a push as a rollout server receives them in a group with its trainer and other servers.

What arrives is written to the files of the push, as parts over HTTP are, and is checked and loaded
with them: a push stays a transaction.

In: broadcast chunks. Out: parts of a push.
"""

from __future__ import annotations

import asyncio
import os
import threading
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np

from moe_replay.engines.serve.access import BAD_REQUEST, DAMAGED, STALE, RefusedError, no_room
from moe_replay.engines.serve.messages import MAX_CHUNK_BYTES, PartTransfer, TransferStart
from moe_replay.engines.transfer_group import (
    TransferGroup,
    check_backend,
    join_store,
    own_address,
)

_Result = TypeVar("_Result")


@runtime_checkable
class Incoming(Protocol):
    """A part of a push that comes as a whole."""

    file: int
    """What its bytes are written to."""
    path: Path
    """Where that lies."""

    def finish(self, num_bytes: int, sums: Sequence[int]) -> None:
        """Keep what was written."""
        ...

    def fail(self) -> None:
        """Keep nothing of it."""
        ...


class Transfers:
    """The group that this server is in, if any, and the part that comes through it.

    ``receiver`` (push, part, bytes) gives what receives a part, or refuses it.
    """

    def __init__(self, receiver: Callable[[str, int, int], Incoming]) -> None:
        self._receiver = receiver
        self._transfer = ""
        self._joining: asyncio.Future[TransferGroup] | None = None
        self._group: TransferGroup | None = None
        self._part: tuple[str, int] | None = None
        self._coming: asyncio.Future[None] | None = None

    def join(self, start: TransferStart) -> None:
        """Begin to join the group of a trainer, in place of the one before.

        Raises:
            RecipeError: when this process has no such transport.
        """
        check_backend(start.backend)
        self._leave()
        self._transfer = start.transfer

        def join() -> TransferGroup:
            return TransferGroup(
                start.backend,
                join_store(start.address, start.port),
                rank=start.rank,
                size=start.size,
                address=own_address(start.address),
            )

        self._joining = _in_own_thread(join, "joins a trainer")

    async def begin(self, push_id: str, number: int, message: PartTransfer) -> None:
        """Begin to receive a part; from now on this server waits for its bytes.

        Raises:
            RefusedError: when the group is another one, or the part cannot be taken.
            EngineError: when the group was not found.
        """
        if self._joining is None or message.transfer != self._transfer:
            raise RefusedError(
                STALE,
                f"this server is in no group {message.transfer}; it was restarted, or another "
                "trainer's group has taken its place",
            )
        joining = self._joining
        group = await joining
        if self._joining is not joining or (self._coming is not None and not self._coming.done()):
            raise RefusedError(STALE, f"this server is receiving part {self._part} of a push")
        self._group, self._part = group, (push_id, number)
        receiver = self._receiver(push_id, number, message.num_bytes)
        sums = message.sums

        def receive() -> None:
            try:
                _receive(group, receiver.file, message.num_bytes, sums)
            except OSError as error:
                receiver.fail()
                group.close()
                raise no_room(error, receiver.path) from error
            except BaseException:
                receiver.fail()
                # The other ranks wait for this one, and fail with it.
                group.close()
                raise
            receiver.finish(message.num_bytes, sums)

        self._coming = _in_own_thread(receive, "receives a part")

    async def end(self, push_id: str, number: int) -> None:
        """Wait until the part that began has arrived.

        Raises:
            RefusedError: when another one began, or its bytes are not those that were sent.
            EngineError: when the group was lost.
        """
        if self._coming is None or self._part != (push_id, number):
            raise RefusedError(STALE, f"part {number} of push {push_id} has not begun here")
        await asyncio.shield(self._coming)

    def _leave(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group = self._joining = None


def _receive(group: TransferGroup, file: int, num_bytes: int, sums: list[int]) -> None:
    """Write the chunks of a part as they come."""
    if len(sums) != -(-num_bytes // MAX_CHUNK_BYTES):
        raise RefusedError(
            BAD_REQUEST, f"{len(sums)} sums of {num_bytes} bytes, expected one a chunk"
        )
    buffer = np.empty(min(num_bytes, MAX_CHUNK_BYTES), dtype=np.uint8)
    damaged = []
    for number, expected in enumerate(sums):
        offset = number * MAX_CHUNK_BYTES
        chunk = buffer[: min(MAX_CHUNK_BYTES, num_bytes - offset)]
        group.broadcast(chunk)
        view = chunk.data
        if zlib.crc32(view) != expected:
            damaged.append(number)  # The others need this rank for the chunks that follow.
        while view.nbytes:
            written = os.pwrite(file, view, offset)
            offset, view = offset + written, view[written:]
    if damaged:
        raise RefusedError(
            DAMAGED, f"chunks {damaged} were damaged in transit; send the part again"
        )


def _in_own_thread(work: Callable[[], _Result], name: str) -> asyncio.Future[_Result]:
    """Run ``work`` in a thread that ends with the process, whatever it waits for."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_Result] = loop.create_future()

    def run() -> None:
        try:
            outcome = partial(future.set_result, work())
        except Exception as error:  # noqa: BLE001 - seam: raised where it is awaited
            outcome = partial(future.set_exception, error)
        # A server that has ended no longer waits for it.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(lambda: future.done() or outcome())

    threading.Thread(target=run, name=f"moe-replay: {name}", daemon=True).start()
    # It may fail unheard, when its trainer has gone.
    future.add_done_callback(lambda done: None if done.cancelled() else done.exception())
    return future
