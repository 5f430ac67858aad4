"""RunLock: a run directory has one writer, so that two trainers cannot mix or delete files.

The lock is the operating system's (a POSIX record lock on ``run.lock``), so it ends with the
process that holds it, however that ends, and holds across machines wherever the file system passes
locks on (NFS does). Where the file system has no locks, `RunLock.note` says so and the run goes on
unprotected.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

from moe_replay.errors import CheckpointError

LOCK_FILE = "run.lock"
"""Name of the locked file; removing it would let two processes lock two files."""
_TAKEN = {errno.EACCES, errno.EAGAIN}


class RunLock:
    """Holds a run directory until it is released.

    A record lock and not flock: processes that this one forks, such as those of reward functions,
    do not inherit it, so an orphan cannot keep the directory after its trainer was killed.
    """

    def __init__(self, directory: Path) -> None:
        """Take the lock of ``directory``, making the folder where it is missing.

        Raises:
            CheckpointError: when another process holds it, or the folder cannot be made or written.
        """
        self.note: str | None = None
        """What to tell the user about a directory that cannot be locked; None when it is."""
        path = directory / LOCK_FILE
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CheckpointError(
                f"{directory} cannot be written: {error.strerror}; run.output_dir needs a folder that this process may write"
            ) from error
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _TAKEN:
                holder = _holder(path)
                os.close(self._descriptor)
                raise CheckpointError(
                    f"{directory} is in use by another trainer: {holder}. Two would mix their steps and checkpoints: wait "
                    "for it, end it, or choose another run.output_dir"
                ) from error
            self.note = f"{directory} cannot be locked ({error.strerror}): nothing keeps a second trainer out of it"
        # A full disk must not keep a run from resuming: without this text a second trainer is
        # refused all the same.
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, _own_name(), 0)

    def release(self) -> None:
        """Give the directory back. Calling it twice is allowed."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _own_name() -> bytes:
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return json.dumps(holder).encode() + b"\n"


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_bytes())
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"its process is not named in {path.name}, which was locked a moment ago or on a full disk"
