"""Trace files: a step's traces on disk, written at once or not at all, and read one trace at a time.

In: named RoutingTraces. Out: a file; headers and traces from it. Called by: cli, trainers that keep their routes.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from moe_replay.errors import CodecError
from moe_replay.routing.codec import (
    DEFAULT_MAX_BYTES,
    FramePlace,
    read_index,
    read_place,
    write_payload,
)
from moe_replay.routing.frame import Encoding, TraceHeader, read_header
from moe_replay.routing.trace import RoutingTrace


def write_trace_file(
    path: str | os.PathLike[str],
    traces: Iterable[tuple[str, RoutingTrace]],
    *,
    encoding: Encoding = Encoding.COMPACT,
) -> int:
    """Write (name, trace) pairs and return the bytes of the file; a reader sees all of it or none.

    The pairs may come from a generator, so that one trace at a time is held. `Encoding.RAW` makes a file whose routes are
    mapped into memory instead of read.

    Raises:
        CodecError: when a name or a number does not fit the format, or the file cannot be written.
    """
    target = Path(path)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.unfinished")
    try:
        try:
            with unfinished.open("wb") as file:
                write_payload(traces, encoding, file.write)
                file.flush()
                os.fsync(file.fileno())
            size = unfinished.stat().st_size
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise CodecError(f"cannot write {target}: {error}") from error
    return size


class TraceFile:
    """A trace file, opened for reading: names and headers without the routes, then one trace at a time.

    The index is checked when the file is opened, a trace whenever it is read. The file is mapped, not loaded: a
    compact trace is decoded from the mapping, and the routes of a raw one *are* the mapping, read-only. It must not be
    changed in place while they are in use; `write_trace_file` never does, it puts a new file in the old one's place.

    Raises:
        CodecError: when the file cannot be read, or is no intact trace file of this version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                # A mapping of nothing cannot be made; no bytes are refused below like any other short file.
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        except OSError as error:
            raise CodecError(f"cannot read {self.path}: {error}") from error
        self._stored = memoryview(mapped)
        self._places = {place.name: place for place in read_index(self._stored, str(self.path))}

    def __len__(self) -> int:
        return len(self._places)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the traces, in the order in which they were written."""
        return tuple(self._places)

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return len(self._stored)

    def place(self, name: str) -> FramePlace:
        """Return where a trace lies in the file, and its checksum."""
        if name not in self._places:
            raise CodecError(
                f"{self.path} holds no trace {name!r}; it holds {len(self)}: {list(self.names[:8])}"
            )
        return self._places[name]

    def header(self, name: str) -> TraceHeader:
        """Return what a trace's header says; only `read` compares it with the checksum."""
        place = self.place(name)
        where = f"{self.path}, trace {name!r}"
        return read_header(self._stored[place.start : place.stop], where)[0]

    def read(self, name: str, *, max_bytes: int = DEFAULT_MAX_BYTES) -> RoutingTrace:
        """Return a trace, checked from the first byte to the last.

        Raises:
            CodecError: when its bytes were altered, or it takes more than ``max_bytes`` in memory.
        """
        return read_place(self._stored, self.place(name), str(self.path), max_bytes=max_bytes)

    def items(self, *, max_bytes: int = DEFAULT_MAX_BYTES) -> Iterator[tuple[str, RoutingTrace]]:
        """Yield every trace with its name; ``max_bytes`` limits each of them."""
        for name in self.names:
            yield name, self.read(name, max_bytes=max_bytes)
