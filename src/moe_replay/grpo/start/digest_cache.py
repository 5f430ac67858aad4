"""DigestCache: digests of files, of which large ones are read once for all starts of a run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Large enough that reading it again at every start would be noticed.
_REMEMBERED = 64 << 20
# A file that was written so shortly before it was read may be written again within one tick of its
# clock.
_SETTLED_NS = 2 * 10**9


class DigestCache:
    """Digests of files; `save` keeps those of large ones in a file.

    A remembered digest holds for a path only while size, inode, time of modification and time of
    change are the same: nobody can set the last of them.
    """

    def __init__(self, path: Path) -> None:
        """Read what ``path`` remembers; a file that is missing or damaged remembers nothing."""
        self._path = path
        self._entries: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(path.read_bytes())
            self._entries = known if isinstance(known, dict) else {}
        self._used: dict[str, Any] = {}

    def digest(
        self, path: Path, read: Callable[[Path, int], str | None] = lambda path, size: None
    ) -> str:
        """Return a file's digest: what ``read`` makes of path and size, else of all its bytes."""
        status = path.stat()
        mark = [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
        name = str(path.absolute())
        entry = self._entries.get(name)
        if isinstance(entry, dict) and entry.get("file") == mark:
            digest = str(entry["digest"])
        else:
            digest = read(path, status.st_size) or _of_bytes(path)
        settled = time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > _SETTLED_NS
        if status.st_size > _REMEMBERED and settled:
            self._used[name] = {"file": mark, "digest": digest}
        return digest

    def save(self) -> None:
        """Keep the digests of large files. A full disk costs only that they are read again."""
        if self._used and self._used != self._entries:
            with contextlib.suppress(OSError):
                self._path.write_text(json.dumps(self._used, indent=1))


def _of_bytes(path: Path) -> str:
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()[:32]
