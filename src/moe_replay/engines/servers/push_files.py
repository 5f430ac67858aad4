"""The files of a weight push, in a folder that vanishes with its trainer however that ends.

::

    weights_dir/                      shared by trainer and servers, such as /dev/shm
        moe-replay-push-7f3a/         one a run, locked as long as its trainer lives
            lock
            push-3/                   one a push, removed when the servers have loaded it
                model-00000.safetensors

A trainer that was killed in the middle of a push leaves up to the whole model in memory. The next
one to start removes it; see `OwnFolder`.

In: ``rollout.weights_dir``, named tensors. Out: parts of a push, as bytes and as files.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import stat
import tempfile
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch

from moe_replay.errors import EngineError, RecipeError

# How safetensors calls a number format.
_FORMATS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_LOCK = "lock"
_PREFIX = "moe-replay-push-"
_REMEDY = (
    "make room (a container's /dev/shm has 64 MB unless it is started with --shm-size), or set "
    "rollout.weights_dir to a folder with room that trainer and servers share"
)


class OwnFolder:
    """A folder below ``parent`` with a name that begins with ``prefix``, removed with the scope.

    Folders of ``prefix`` whose owners were killed are removed first. The kernel drops a lock with
    its last holder, so no process id is compared, which another process may have by now. The lock
    names its machine, because not every network file system shows locks to other machines: folders
    of others stay. Without locks nothing is swept. Names with a leading dot are still being made.
    ``mode`` says who may read the folder.

    Examples:
        >>> with OwnFolder(Path("/dev/shm"), "moe-replay-serve-") as folder:
        ...     (folder.path / "model-00000.safetensors").touch()

    Raises:
        RecipeError: when nothing can be made below ``parent``.
    """

    def __init__(self, parent: Path, prefix: str, *, mode: int = 0o700) -> None:
        try:
            for path in parent.glob(f"{prefix}*"):
                _remove_if_abandoned(path)
            new = Path(tempfile.mkdtemp(prefix=f".{prefix}", dir=parent))
            self._lock = os.open(new / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
            os.write(self._lock, _machine())
            with suppress(OSError):
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Keeps the set-group-id bit that it inherited.
            new.chmod(mode | (new.stat().st_mode & stat.S_ISGID))
            self.path = new.rename(parent / new.name[1:])
        except OSError as error:
            raise RecipeError(
                f"no folder can be made below {parent}: {error}; name a folder that exists and is "
                "writable"
            ) from error

    def remove(self) -> None:
        """Remove the folder and what is in it. Calling it twice is allowed."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> OwnFolder:
        """Return itself."""
        return self

    def __exit__(self, *raised: object) -> None:
        """Remove the folder."""
        self.remove()


def _remove_if_abandoned(path: Path) -> None:
    """Remove a folder whose lock is free."""
    try:
        lock = os.open(path / _LOCK, os.O_RDWR)
    except OSError:
        return  # Not ours, of another user, or just removed.
    try:
        if os.read(lock, 256) == _machine():
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
    except OSError:
        pass  # Its owner is alive.
    finally:
        os.close(lock)


def _machine() -> bytes:
    return socket.gethostname().encode()


class WeightsFolder:
    """The folder of one run below ``parent``; it exists from its first file until `close`.

    The user of the trainer can read the files, and so can a group if ``parent`` has the
    set-group-id bit, as in ``install -d -m 2750 -g GROUP FOLDER``.

    Examples:
        >>> folder = WeightsFolder(Path("/dev/shm"))
        >>> folder.save("push-3", "model-00000.safetensors", [memoryview(content)])
        PosixPath('/dev/shm/moe-replay-push-x1b2/push-3/model-00000.safetensors')
    """

    def __init__(self, parent: Path | None) -> None:
        self._parent = parent
        self._own: OwnFolder | None = None

    def save(self, push: str, name: str, pieces: Sequence[memoryview]) -> Path:
        """Write a file of a push, which is ``pieces`` end to end, and return its path.

        Raises:
            RecipeError: no folder was named.
            EngineError: it cannot be written.
        """
        if self._parent is None:
            raise RecipeError(
                "servers that read weights from files need a folder for them; name one that they "
                "can read"
            )
        try:
            if self._own is None:
                self._own = OwnFolder(self._parent, _PREFIX, mode=self._mode())
            folder = self._own.path / push
            folder.mkdir(mode=self._mode(), exist_ok=True)
            path = folder / name
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, self._mode() & 0o666)
            with open(descriptor, "wb") as file:
                for piece in pieces:
                    file.write(piece)
        except (OSError, RecipeError) as error:
            num_bytes = sum(piece.nbytes for piece in pieces)
            raise EngineError(
                f"{num_bytes} bytes of weights cannot be written below {self._parent}: {error}; "
                f"{_REMEDY}"
            ) from error
        return path

    def need_room(self, num_bytes: int) -> None:
        """Raise `EngineError` unless there is room for a push of so many bytes."""
        if self._parent is None:
            return
        try:
            free = shutil.disk_usage(self._parent).free
        except OSError as error:
            raise EngineError(
                f"rollout.weights_dir is {self._parent}, which cannot be used: {error}; name a "
                "folder that trainer and servers share"
            ) from error
        if free < num_bytes:
            raise EngineError(
                f"a push writes {num_bytes} bytes of weights below {self._parent}, which has {free} "
                f"bytes left; {_REMEDY}"
            )

    def remove(self, push: str) -> None:
        """Remove the files of a push, if there are any."""
        if self._own is not None:
            shutil.rmtree(self._own.path / push, ignore_errors=True)

    def close(self) -> None:
        """Remove the folder. Calling it twice is allowed."""
        if self._own is not None:
            self._own.remove()
        self._own = None

    def _mode(self) -> int:
        assert self._parent is not None
        is_for_group = self._parent.stat().st_mode & stat.S_ISGID
        return 0o750 if is_for_group else 0o700


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece of a part, as long as one call may send."""

    offset: int
    """Where it begins in the part's file."""
    pieces: Sequence[memoryview]
    """Its bytes, where they are: nothing is copied for each server."""
    crc32: int
    """Of its bytes."""


class WeightPart:
    """A part of a push: a safetensors file in memory, written once if any server reads files."""

    def __init__(
        self,
        number: int,
        pieces: Sequence[memoryview],
        folder: WeightsFolder,
        push: str,
        *,
        tensors: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Make the part whose file is ``pieces`` end to end."""
        self.number = number
        """Index in the push, from 0."""
        self.tensors: Mapping[str, torch.Tensor] = tensors or {}
        """What the file holds, in its order."""
        self.num_bytes = sum(piece.nbytes for piece in pieces)
        """Length of the file."""
        self._pieces = pieces
        self._folder, self._push = folder, push
        self._path: Path | None = None
        self._chunks: list[Chunk] = []
        self._turn = threading.Lock()

    def chunks(self, max_bytes: int) -> Iterator[Chunk]:
        """Yield the file in chunks of at most ``max_bytes``, each summed once for all servers."""
        for number, offset in enumerate(range(0, self.num_bytes, max_bytes)):
            with self._turn:
                if number == len(self._chunks):
                    pieces = _cut(self._pieces, offset, offset + max_bytes)
                    crc32 = 0
                    for piece in pieces:
                        crc32 = zlib.crc32(piece, crc32)
                    self._chunks.append(Chunk(offset=offset, pieces=pieces, crc32=crc32))
            assert self._chunks[number].offset == offset, "one length of chunks for all servers"
            yield self._chunks[number]

    @property
    def path(self) -> Path:
        """Path of the file until the push is over; reading this writes it.

        Raises:
            RecipeError: when no folder was named for it.
            EngineError: when it cannot be written.
        """
        with self._turn:
            if self._path is None:
                name = f"model-{self.number:05d}.safetensors"
                self._path = self._folder.save(self._push, name, self._pieces)
            return self._path


def _cut(pieces: Sequence[memoryview], start: int, stop: int) -> list[memoryview]:
    """Return the bytes ``start:stop`` of pieces end to end, without a copy.

    Pieces of 3 and 4 bytes, cut at 2:5, give the last byte of the first and two of the second.
    """
    found, before = [], 0
    for piece in pieces:
        cut = piece[max(start - before, 0) : max(stop - before, 0)]
        if cut.nbytes:
            found.append(cut)
        before += piece.nbytes
    return found


@contextmanager
def weight_parts(
    weights: Iterable[tuple[str, torch.Tensor]],
    *,
    folder: WeightsFolder,
    push: str,
    bucket_bytes: int,
) -> Iterator[Iterator[WeightPart]]:
    """Yield the parts of a push; their files are removed with the scope.

    A part holds complete tensors, as many as fit into ``bucket_bytes``, or a larger one alone. One
    is made at a time. Their files, if a server reads any, lie in the folder ``push`` of ``folder``.
    """
    try:
        # Unlike a loop, `map` does not hold the part before while the next one is made.
        yield map(
            lambda number, bucket: WeightPart(number, _file(bucket), folder, push, tensors=bucket),
            count(),
            _buckets(weights, bucket_bytes),
        )
    finally:
        folder.remove(push)


def _buckets(
    weights: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield tensors by name, those of the widest formats first."""
    bucket: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in weights:
        if bucket and size + tensor.nbytes > bucket_bytes:
            yield _taken(bucket)
            size = 0
        bucket[name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
        # No reference may keep it in memory while its part is sent.
        del tensor
    if bucket:
        yield _taken(bucket)


def _taken(bucket: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    ordered = sorted(bucket.items(), key=lambda entry: -entry[1].element_size())
    bucket.clear()
    return dict(ordered)


def _file(bucket: Mapping[str, torch.Tensor]) -> list[memoryview]:
    """Return a safetensors file of the tensors, which stay where they are.

    The format: 8 bytes with the length of the header, the header as JSON padded with spaces to a
    multiple of 8, and the values. Widest formats come first, so that each tensor begins at a
    multiple of its own width.
    """
    header, values, end = {}, list[memoryview](), 0
    for name, tensor in bucket.items():
        if tensor.dtype not in _FORMATS:
            raise EngineError(
                f"weight {name} was pushed as {tensor.dtype}, expected one of {list(_FORMATS)}: push "
                "the weights in the rollout's number format"
            )
        header[name] = {
            "dtype": _FORMATS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
        values.append(tensor.reshape(-1).view(torch.uint8).numpy().data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [memoryview(len(text).to_bytes(8, "little") + text), *values]
