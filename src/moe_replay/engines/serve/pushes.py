"""Pushes of weights as a rollout server receives them: one at a time, in files that are checked.

In: chunks of the files of a push. Out: a folder with safetensors files that are what their sender
sent.
"""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import zlib
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from moe_replay.checkpoint.facts import ModelFacts
from moe_replay.engines.serve.access import (
    BAD_REQUEST,
    DAMAGED,
    STALE,
    RefusedError,
    no_room,
)
from moe_replay.engines.serve.messages import MAX_PARTS, PushCommit, sum_of_sums
from moe_replay.engines.weight_stream import fitting_weights, folder_tensors
from moe_replay.errors import EngineError

# The number formats that weights may have.
_FORMATS = (torch.float32, torch.bfloat16, torch.float16)
_BYTES_PER_VALUE = 4
# A tensor's entry in the header of its file: name, shape, offsets.
_HEADER_BYTES_PER_TENSOR = 1 << 10
_MAX_ODD = 4


def largest_push(facts: ModelFacts) -> int:
    """Return the maximum size of a push: all weights in float32, with their files' headers."""
    shapes = list(facts.weight_shapes.values())
    # Tied tensors may all be pushed, though the checkpoint holds one of them.
    tied = max(
        (math.prod(facts.weight_shapes.get(name, ())) for name in facts.tied_names), default=0
    )
    values = sum(math.prod(shape) for shape in shapes) + tied * len(facts.tied_names)
    return _BYTES_PER_VALUE * values + _HEADER_BYTES_PER_TENSOR * (len(shapes) + 1024)


class Push:
    """One push while its parts come."""

    def __init__(self, push_id: str, folder: Path) -> None:
        self.push_id = push_id
        self.folder = folder
        """Where its files lie."""
        self.is_superseded = False
        """Whether another push has begun since."""
        self.is_loaded = False
        """Whether the engine holds its weights, and owns its folder."""
        self.loading: asyncio.Task[Any] | None = None
        """The call that commits it, which another push cancels until the engine loads."""
        self._parts: dict[int, _Part] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.size for part in self._parts.values())

    def supersede(self) -> None:
        """Let nothing more be done with this push."""
        self.is_superseded = True
        if self.loading is not None:
            self.loading.cancel()

    def check_current(self) -> None:
        """Raise `RefusedError` when another push has begun since this one."""
        if self.is_superseded:
            raise superseded(self.push_id)

    def part(self, number: int) -> _Part:
        """Return a part, which is made when it is new."""
        if number not in self._parts:
            self._parts[number] = _Part(self.folder / f"model-{number:05d}.safetensors")
        return self._parts[number]

    def check_complete(self, commit: PushCommit) -> None:
        """Raise `RefusedError` unless every part came as it was sent."""
        ours = {number: (part.size, sum_of_sums(part.sums)) for number, part in self._parts.items()}
        theirs = {number: (part.num_bytes, part.sum) for number, part in enumerate(commit.parts)}
        if ours != theirs:
            odd = sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
            raise RefusedError(
                BAD_REQUEST,
                f"push {self.push_id} has {len(ours)} parts of {self.num_bytes} bytes, expected "
                f"{len(theirs)} of {sum(size for size, _ in theirs.values())}; these are missing, cut "
                f"or damaged: {odd[:_MAX_ODD]}; push again",
            )


class _Part:
    """A file of a push, which grows by chunks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self.sums: list[int] = []
        self._last_start = self._last_count = 0
        self.is_busy = False

    def rewind(self, offset: int) -> None:
        """Take back the last chunk when it is sent again, as after a broken connection."""
        if offset == self._last_start < self.size:
            del self.sums[self._last_count :]
            self.size = offset

    def grow(self, num_bytes: int, crc32: int) -> None:
        """Keep a chunk that was written behind the others."""
        self._last_start, self._last_count = self.size, len(self.sums)
        self.size += num_bytes
        self.sums.append(crc32)

    def become(self, num_bytes: int, sums: Sequence[int]) -> None:
        """Keep what was written in place of all chunks; sent again, it begins at 0."""
        self.size, self.sums = num_bytes, list(sums)
        self._last_start = self._last_count = 0


class PartReceiver:
    """A part that comes as a whole, in another thread."""

    def __init__(self, part: _Part) -> None:
        self._part, self.path = part, part.path
        part.is_busy = True
        part.become(0, ())
        try:
            self.file = os.open(part.path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
            """What its bytes are written to."""
        except OSError:
            part.is_busy = False
            raise

    def finish(self, num_bytes: int, sums: Sequence[int]) -> None:
        """Keep what was written."""
        self._part.become(num_bytes, sums)
        self.fail()

    def fail(self) -> None:
        """Keep nothing that was not kept before; the part may be sent again."""
        os.close(self.file)
        self._part.is_busy = False


class Pushes:
    """The incoming push, if any: at most ``max_bytes`` in ``folder``."""

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._push: Push | None = None
        self._num_pushes = 0

    async def begin(self, push_id: str) -> None:
        """Begin a push, in place of the one before it."""
        former = self._push
        if former is not None and former.push_id == push_id:
            return  # Asked again, since the answer was lost.
        self._num_pushes += 1
        folder = self._folder / f"push-{self._num_pushes}"
        folder.mkdir()
        self._push = Push(push_id, folder)
        if former is not None:
            former.supersede()
            await asyncio.to_thread(shutil.rmtree, former.folder, ignore_errors=True)

    def current(self, push_id: str) -> Push:
        """Return the push of this id.

        Raises:
            RefusedError: when it was superseded, or is not known at all.
        """
        if self._push is None or self._push.push_id != push_id:
            raise superseded(push_id)
        return self._push

    def release(self, push: Push) -> None:
        """Forget a push whose folder is the engine's now."""
        if self._push is push:
            self._push = None

    async def drop(self, push: Push) -> None:
        """Forget a push that failed, and remove its folder."""
        self.release(push)
        await asyncio.to_thread(shutil.rmtree, push.folder, ignore_errors=True)

    async def take(
        self, push_id: str, number: int, *, offset: int, crc32: int, pieces: AsyncIterator[bytes]
    ) -> None:
        """Write a chunk behind the others of its part; the last one may come again.

        Raises:
            RefusedError: when it is of another push, damaged, out of order, or more than a model of
                this size has.
        """
        push, part = self._free_part(push_id, number)
        part.is_busy = True
        try:
            part.rewind(offset)
            if offset != part.size:
                raise RefusedError(
                    BAD_REQUEST,
                    f"a chunk of part {number} begins at byte {offset}, expected {part.size}: chunks "
                    "come in order, one at a time",
                )
            size, found = await self._write(push, part, pieces)
            if found != crc32 or size == 0:
                raise RefusedError(
                    DAMAGED,
                    f"a chunk of {size} bytes of part {number} has the CRC-32 {found:08x}, expected "
                    f"{crc32:08x}; it was damaged in transit, send it again",
                )
            part.grow(size, crc32)
        finally:
            part.is_busy = False

    def receiver(self, push_id: str, number: int, num_bytes: int) -> PartReceiver:
        """Return what receives a part that comes as a whole, in place of what came of it.

        Raises:
            RefusedError: as `take`.
        """
        push, part = self._free_part(push_id, number)
        if push.num_bytes - part.size + num_bytes > self._max_bytes:
            raise self._too_large()
        return PartReceiver(part)

    def _free_part(self, push_id: str, number: int) -> tuple[Push, _Part]:
        push = self.current(push_id)
        if push.loading is not None:
            raise RefusedError(STALE, f"push {push_id} was committed, and takes no more parts")
        if not 0 <= number < MAX_PARTS:
            raise RefusedError(
                BAD_REQUEST, f"part {number} of a push, expected 0 to {MAX_PARTS - 1}"
            )
        part = push.part(number)
        if part.is_busy:
            raise RefusedError(
                STALE,
                f"two chunks of part {number} of a push came at once, expected one after the other",
            )
        return push, part

    def _too_large(self) -> RefusedError:
        return RefusedError(
            BAD_REQUEST,
            f"the push exceeds {self._max_bytes} bytes, what all weights of this model have in "
            "float32; the trainer's model is another one",
        )

    async def _write(
        self, push: Push, part: _Part, pieces: AsyncIterator[bytes]
    ) -> tuple[int, int]:
        """Write pieces as they arrive, not held in memory; return their length and CRC-32."""
        size = crc32 = 0
        before = push.num_bytes
        # Superseded or not, the folder of a push that comes in is there: nothing awaits between
        # `current` and here.
        file = os.open(part.path, os.O_CREAT | os.O_WRONLY, 0o600)
        try:
            async for piece in pieces:
                push.check_current()
                if before + size + len(piece) > self._max_bytes:
                    raise self._too_large()
                crc32 = zlib.crc32(piece, crc32)
                while piece:
                    # A disk that is nearly full takes a part of it, and the next call says why.
                    written = os.pwrite(file, piece, part.size + size)
                    size, piece = size + written, piece[written:]
            os.ftruncate(file, part.size + size)
        except OSError as error:
            raise no_room(error, part.path) from error
        finally:
            os.close(file)
        return size, crc32


def superseded(push_id: str) -> RefusedError:
    """Return the refusal of a part or commit of a push that is not the current one."""
    return RefusedError(
        STALE,
        f"push {push_id} is not the current one of this server: another one has begun since, or the "
        "server was restarted; two trainers that push to one server overwrite each other's weights",
    )


def check_tensors(folder: Path, facts: ModelFacts | None) -> None:
    """Raise `RefusedError` unless the files of a push hold all weights once, in a valid format.

    Values are the engine's to check; ``facts`` None leaves names and shapes to it too.
    """
    tensors = _of_known_formats(folder_tensors(folder))
    try:
        for _ in tensors if facts is None else fitting_weights(tensors, facts):
            continue
    except EngineError as error:
        raise RefusedError(BAD_REQUEST, str(error)) from error


def _of_known_formats(
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors:
        if tensor.dtype not in _FORMATS:
            raise EngineError(
                f"weight {name} was pushed as {tensor.dtype}, expected one of {_FORMATS}: push the "
                "weights in the rollout's number format"
            )
        yield name, tensor
