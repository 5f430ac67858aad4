"""What is found out about a large dataset is kept on disk, so that one process of a machine works and all others wait for it.

Entries are named after path, size and times of the files that they were made from: a file that is written again, even with the
same length and modification time, has another entry, because nobody can set its time of change.

In: files, and what is to be found out about them. Out: the folder of an entry.
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
"""Called with what is being done, how much is done, and how much there is."""

_FORMAT = 1
_UNUSED_S = 30 * 24 * 3600
_POLL_S = 0.2
_MANY_ROWS = 2000


class DatasetCache:
    """A folder of entries, each made once and then only read."""

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
        """What a person should know about the cache."""

    def is_worth_it(self, paths: Sequence[Path], *, num_rows: int = 0) -> bool:
        """Return whether files are so large, or hold so many rows, that working on them twice would be noticed."""
        if self._folder is None:
            return False
        return num_rows >= _MANY_ROWS or sum(p.stat().st_size for p in paths) >= self._min_bytes

    def report(self, what: str, done: int, total: int) -> None:
        """Tell how far the work has come."""
        if self._progress is not None:
            self._progress(what, done, total)

    def entry(self, key: str, make: Callable[[Path], None]) -> Path | None:
        """Return the folder of an entry, which ``make`` fills if no process has done so before.

        None when the cache cannot be written; what ``make`` raises besides is passed on.
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
                f"{self._folder} cannot be used to keep what was read of a dataset ({error}): every process reads it for "
                "itself; name another folder in data.cache_dir"
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
        """Pass on how far the process that holds the lock has come."""
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
    """Return a name for what is derived from files and ``parts``; it differs once a file has been written to."""
    states = []
    for path in paths:
        state = path.stat()
        states.append(
            [
                str(path.resolve()),
                state.st_size,
                state.st_mtime_ns,
                state.st_ctime_ns,
                state.st_ino,
            ]
        )
    text = json.dumps([_FORMAT, states, parts])
    return hashlib.sha256(text.encode()).hexdigest()[:32]
