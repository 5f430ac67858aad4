"""Cache what is derived from a large dataset, so that only one process a machine works.

Entries are named after path, size and times of their source files. A file that is rewritten, even
with the same size and modification time, gets another entry, because its change time cannot be set.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

Progress = Callable[[str, int, int], None]
"""Called with the work, how much of it is done, and the total."""

_FORMAT = 1
_UNUSED_S = 30 * 24 * 3600
_POLL_S = 0.2
_MANY_ROWS = 2000


class DatasetCache:
    """A folder of entries, each written once and then only read."""

    def __init__(
        self,
        folder: Path | None,
        *,
        progress: Progress | None = None,
        min_bytes: int = 1 << 20,
    ) -> None:
        self._folder = folder
        self._progress = progress
        self._min_bytes = min_bytes
        self.notes: list[str] = []
        """Notes about the cache for the user."""

    def is_worth_it(self, paths: Sequence[Path], *, num_rows: int = 0) -> bool:
        """Return whether files are large enough, or have enough rows, for caching to pay off."""
        if self._folder is None:
            return False
        return num_rows >= _MANY_ROWS or sum(p.stat().st_size for p in paths) >= self._min_bytes

    def report(self, what: str, done: int, total: int) -> None:
        """Report progress."""
        if self._progress is not None:
            self._progress(what, done, total)

    def entry(self, key: str, make: Callable[[Path], None]) -> Path | None:
        """Return the folder of an entry, filled by ``make`` unless a process has done so before.

        None if the cache cannot be written; other errors of ``make`` propagate.
        """
        assert self._folder is not None
        entry = self._folder / key
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not entry.is_dir():
                with self._locked(self._folder / f"{key}.lock") as lock:
                    if not entry.is_dir():
                        self._make(entry, make, lock)
            os.utime(entry)
        except OSError as error:
            self.notes.append(
                f"{self._folder} cannot be used to cache a dataset ({error}): every process reads it for "
                "itself; set another folder in data.cache_dir"
            )
            return None
        return entry

    def _make(self, entry: Path, make: Callable[[Path], None], lock: TextIO) -> None:
        self._remove_unused()
        unfinished = entry.with_name(f"{entry.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(mode=0o700)
        ours, self._progress = self._progress, self._shared(lock, self._progress)
        try:
            make(unfinished)
            unfinished.rename(entry)
        finally:
            self._progress = ours
            shutil.rmtree(unfinished, ignore_errors=True)

    def _shared(self, lock: TextIO, progress: Progress | None) -> Progress:
        """Return a progress that those who wait for the lock can read too."""

        def report(what: str, done: int, total: int) -> None:
            lock.seek(0)
            lock.truncate()
            lock.write(json.dumps([what, done, total]))
            lock.flush()
            if progress is not None:
                progress(what, done, total)

        return report

    @contextmanager
    def _locked(self, path: Path) -> Iterator[TextIO]:
        with path.open("a+") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    self._report_other(path)
                    time.sleep(_POLL_S)
            yield lock

    def _report_other(self, path: Path) -> None:
        """Report the progress of the process that holds the lock."""
        try:
            what, done, total = json.loads(path.read_text())
        except (OSError, ValueError):
            return
        self.report(what, done, total)

    def _remove_unused(self) -> None:
        assert self._folder is not None
        oldest = time.time() - _UNUSED_S
        for entry in self._folder.iterdir():
            if entry.is_dir() and entry.stat().st_mtime < oldest:
                shutil.rmtree(entry, ignore_errors=True)


def entry_key(paths: Sequence[Path], *parts: str) -> str:
    """Return a name for what is derived from files and ``parts``; it changes with the files."""
    states = []
    for path in paths:
        s = path.stat()
        states.append([str(path.resolve()), s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino])
    text = json.dumps([_FORMAT, states, parts])
    return hashlib.sha256(text.encode()).hexdigest()[:32]
