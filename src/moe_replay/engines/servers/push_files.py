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
import os
import shutil
import socket
import stat
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors.torch import save as save_tensors

from moe_replay.errors import EngineError, RecipeError

PART_BYTES = 256 << 20
"""A part of a push is closed by the tensor that brings it to this size."""
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

    Example:
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

    Example:
        >>> folder = WeightsFolder(Path("/dev/shm"))
        >>> folder.save("push-3", "model-00000.safetensors", content)
        PosixPath('/dev/shm/moe-replay-push-x1b2/push-3/model-00000.safetensors')
    """

    def __init__(self, parent: Path | None) -> None:
        self._parent = parent
        self._own: OwnFolder | None = None

    def save(self, push: str, name: str, content: bytes) -> Path:
        """Write a file of a push and return its path.

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
                file.write(content)
        except (OSError, RecipeError) as error:
            raise EngineError(
                f"{len(content)} bytes of weights cannot be written below {self._parent}: {error}; "
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


class WeightPart:
    """A part of a push: a safetensors file in memory, written once if any server reads files."""

    def __init__(self, number: int, content: bytes, folder: WeightsFolder, push: str) -> None:
        self.number = number
        """Index in the push, from 0."""
        self.content = content
        """The file."""
        self._folder, self._push = folder, push
        self._path: Path | None = None
        self._turn = threading.Lock()

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
                self._path = self._folder.save(self._push, name, self.content)
            return self._path


@contextmanager
def weight_parts(
    weights: Iterable[tuple[str, torch.Tensor]], *, folder: WeightsFolder, push: str
) -> Iterator[Iterator[WeightPart]]:
    """Yield the parts of a push, about 256 MiB each; their files are removed with the scope.

    A part holds complete tensors, and one part is in memory at a time. Their files, if a server
    reads any, lie in the folder ``push`` of ``folder``.
    """
    try:
        yield (
            WeightPart(number, content, folder, push)
            for number, content in enumerate(_contents(weights))
        )
    finally:
        folder.remove(push)


def _contents(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[bytes]:
    part: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in weights:
        part[name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
        # No reference may keep it in memory while its part is sent.
        del tensor
        if size >= PART_BYTES:
            yield _taken(part)
            size = 0
    if part:
        yield _taken(part)


def _taken(part: dict[str, torch.Tensor]) -> bytes:
    content = save_tensors(part)
    part.clear()
    return content
