"""A run's own folder for the files of its weight pushes, which leaves nothing behind even if the trainer is killed.

::

    weights_dir/                      shared by trainer and servers, such as /dev/shm
        moe-replay-push-7f3a/           one a run, locked as long as its trainer lives
            lock
            push-3/                   one a push, gone when the servers have loaded it
                model-00000.safetensors

A trainer that was killed in the middle of a push leaves up to the whole model in memory, which the next one to start
removes; see `OwnFolder`.

In: ``rollout.weights_dir``. Out: paths of files that servers read.
"""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from moe_replay.engines.servers.own_folder import OwnFolder
from moe_replay.errors import EngineError, RecipeError

_PREFIX = "moe-replay-push-"


class WeightsFolder:
    """The folder of one run below ``parent``; it exists from its first file until `close`.

    The files can be read by the user of the trainer, and by a group if ``parent`` has the set-group-id bit, as in
    ``install -d -m 2750 -g GROUP FOLDER``.

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
                "servers that read weights from files need a folder for them; name one that they can read"
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
                f"{len(content)} bytes of weights cannot be written below {self._parent}: {error}; make room (a container's "
                "/dev/shm has 64 MB unless it is started with --shm-size), or set rollout.weights_dir to a folder that "
                "trainer and servers share"
            ) from error
        return path

    def need_room(self, num_bytes: int) -> None:
        """Raise `EngineError` unless a push of so many bytes has room, before half of one is written."""
        if self._parent is None:
            return
        try:
            free = shutil.disk_usage(self._parent).free
        except OSError as error:
            raise EngineError(
                f"rollout.weights_dir is {self._parent}, which cannot be used: {error}; name a folder that trainer and "
                "servers share"
            ) from error
        if free < num_bytes:
            raise EngineError(
                f"a push writes {num_bytes} bytes of weights below {self._parent}, which has {free} bytes left; make room (a "
                "container's /dev/shm has 64 MB unless it is started with --shm-size), or set rollout.weights_dir to a "
                "folder with room that trainer and servers share"
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
