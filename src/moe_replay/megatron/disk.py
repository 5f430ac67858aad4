"""Writes that fail on any rank are explained once and raised on all ranks together."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from moe_replay.errors import CheckpointError
from moe_replay.megatron.ranks.messages import all_ranks

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class SharedWrite:
    """One write in which every rank has a part.

    A rank whose part fails goes on to `finish`, where all ranks learn of it: a rank that raised
    alone would leave the others waiting in their next collective.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._error: Exception | None = None

    @contextmanager
    def part(self) -> Iterator[None]:
        """Keep the first failure of what is inside, which must not be collective."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            self._error = self._error or error

    def finish(self) -> None:
        """Raise on every rank what failed on any; collective.

        Raises:
            CheckpointError: when a part failed.
        """
        text = None if self._error is None else explain(self._path, self._error)
        ranks = all_ranks()
        failed = ranks.first(text)
        if failed is not None:
            rank, reason = failed
            where = f" on rank {rank}" if ranks.size > 1 else ""
            raise CheckpointError(f"writing {self._path} failed{where}: {reason}") from self._error


def flush_folder(folder: Path) -> None:
    """Force the folder's files and names to the disk, so that the rename cannot overtake them.

    Of a folder in it, the names: who wrote its files has flushed them.
    """
    for path in [*folder.iterdir(), folder] if folder.is_dir() else []:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def explain(path: Path, error: BaseException) -> str:
    """Say in one line what kept ``path`` from being written, and what to do.

    torch's zip writer raises a `RuntimeError` of its own over the system's error, and safetensors
    puts it into a text.
    """
    cause = _system_error(error)
    if cause is None:
        return f"{type(error).__name__}: {error}"
    parent = next((folder for folder in (path, *path.parents) if folder.is_dir()), Path("/"))
    if cause.errno in _FULL:
        free = shutil.disk_usage(parent).free / 2**20
        full = "the quota is used up" if cause.errno == errno.EDQUOT else "the disk is full"
        return f"{cause.strerror}: {full} ({free:.0f} MiB free)"
    return f"{cause.strerror}: the disk refused"


def _system_error(error: BaseException) -> OSError | None:
    """Return the operating system's error behind an exception."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            return seen
        seen = seen.__cause__ or seen.__context__
    for number in _FULL:
        if f"(os error {number})" in str(error):
            return OSError(number, os.strerror(number))
    return None
