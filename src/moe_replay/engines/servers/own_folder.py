"""Folders that no dead process leaves behind: each is locked by the process that owns it, and unlocked ones are swept.

In: a parent folder. Out: a folder that lives as long as its owner.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from moe_replay.errors import RecipeError

_LOCK = "lock"


class OwnFolder:
    """A folder below ``parent`` with a name that begins with ``prefix``, gone when the scope is left.

    Folders of ``prefix`` whose owners were killed are removed first. The kernel drops a lock with its last holder, so no
    process id is compared, which another process may have by now. The lock names its machine, because not every network's
    file system shows locks to other machines: folders of others stay. Where there are no locks, nothing is swept. Names
    with a dot before them are still being made. ``mode`` says who may read the folder.

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
            # Keeps the set-group-id bit that it has of its parent.
            new.chmod(mode | (new.stat().st_mode & stat.S_ISGID))
            self.path = new.rename(parent / new.name[1:])
        except OSError as error:
            raise RecipeError(
                f"no folder can be made below {parent}: {error}; name one that exists and can be written"
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
    """Remove a folder whose lock nobody holds."""
    try:
        lock = os.open(path / _LOCK, os.O_RDWR)
    except OSError:
        return  # Not one of ours, of another user, or removed this very moment.
    try:
        if os.read(lock, 256) == _machine():
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
    except OSError:
        pass  # Its owner lives.
    finally:
        os.close(lock)


def _machine() -> bytes:
    return socket.gethostname().encode()
