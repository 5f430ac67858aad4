"""Trace files: traces on disk, written at once or one by one, and read one at a time."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from moe_replay.errors import CodecError
from moe_replay.routing.format.codec import (
    DEFAULT_MAX_BYTES,
    PREAMBLE,
    FramePlace,
    pack_index,
    read_index,
    read_place,
    write_named,
    write_payload,
)
from moe_replay.routing.format.frame import CHECKSUM_BYTES, Encoding, TraceHeader, read_header
from moe_replay.routing.format.whole_file import whole_file
from moe_replay.routing.trace import RoutingTrace


def write_trace_file(
    path: str | os.PathLike[str],
    traces: Iterable[tuple[str, RoutingTrace]],
    *,
    encoding: Encoding = Encoding.COMPACT,
) -> int:
    """Write (name, trace) pairs and return the bytes of the file; a reader sees all of it or none.

    The pairs may come from a generator, so that one trace at a time is held. `Encoding.RAW` makes a
    file whose routes are mapped into memory instead of read.

    Raises:
        CodecError: when a name or a number does not fit the format, or the file cannot be written.
    """
    target = Path(path)
    try:
        with whole_file(target) as file:
            write_payload(traces, encoding, file.write)
            size = file.tell()
    except OSError as error:
        raise CodecError(f"cannot write {target}: {error}") from error
    return size


class TraceWriter:
    """A trace file that grows by one trace at a time; another process can continue it after a kill.

    Before `finish` writes the index, the file holds only frames, one after another; the process
    that continues it says which of them to keep. `num_cut_bytes` counts what
    lay behind them, such as half a frame.

    Examples:
        >>> writer = TraceWriter(Path("step.traces"))
        >>> place = writer.append("sample 0", trace)
        >>> writer.finish()

    Raises:
        CodecError: when the file cannot be opened, or does not hold the frames to keep.
    """

    def __init__(
        self,
        path: Path,
        *,
        encoding: Encoding = Encoding.COMPACT,
        places: Sequence[FramePlace] = (),
    ) -> None:
        self._path, self._encoding = path, encoding
        self._places = list(places)
        self._names = {place.name for place in places}
        try:
            self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        except OSError as error:
            raise CodecError(f"cannot write {path}: {error}") from error
        try:
            self.num_cut_bytes = self._cut_tail()
        except BaseException:
            self._file.close()
            raise

    def append(self, name: str, trace: RoutingTrace) -> FramePlace:
        """Append a trace and return where it lies.

        Raises:
            CodecError: when a name or a number does not fit the format.
        """
        if self._is_finished:
            self._file.truncate(self._end)
            self._file.seek(self._end)
            self._is_finished = False
        place = write_named(
            name, trace, self._encoding, self._file.write, at=self._end, taken=self._names
        )
        self._places.append(place)
        return place

    def sync(self) -> None:
        """Return when everything written so far is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Write the index, unless it is there, which makes these frames a trace file; close it."""
        if not self._is_finished:
            self._file.write(pack_index(self._places))
            self.sync()
        self.close()

    def close(self) -> None:
        """Leave the file as it is. Calling it twice is allowed."""
        self._file.close()

    @property
    def _end(self) -> int:
        return self._places[-1].stop if self._places else len(PREAMBLE)

    def _cut_tail(self) -> int:
        """Cut off all behind the frames to keep; return how many bytes, not counting an index."""
        size = self._file.seek(0, os.SEEK_END)
        if size < self._end and self._places:
            raise CodecError(
                f"{self._path}: {size} bytes, expected the {len(self._places)} traces of which the last ends at byte "
                f"{self._end}: the file was cut off or replaced; remove the rollout and sample it again"
            )
        for place in self._places:
            self._file.seek(place.stop - CHECKSUM_BYTES)
            if self._file.read(CHECKSUM_BYTES) != place.checksum:
                raise CodecError(
                    f"{self._path}, trace {place.name!r}: bytes {place.start}:{place.stop} do not end with its checksum; "
                    "the file was altered or replaced: remove the rollout and sample it again"
                )
        self._file.seek(self._end)
        index, num_behind = pack_index(self._places), max(0, size - self._end)
        self._is_finished = num_behind == len(index) and self._file.read() == index
        if self._is_finished:
            return 0
        self._file.seek(self._end)
        self._file.truncate()
        if not self._places:
            self._file.seek(0)
            self._file.write(PREAMBLE)
        return num_behind


class TraceFile:
    """A trace file, opened for reading: names and headers without the routes, then trace by trace.

    The index is checked when the file is opened, a trace whenever it is read. The file is mapped,
    not loaded: a compact trace is decoded from the mapping, and the routes of a raw one *are* the
    mapping, read-only. It must not be changed in place while they are in use; `write_trace_file`
    never does, it replaces the old file by a new one. Several files, such as the shards of a
    rollout, read as one.

    Raises:
        CodecError: when a file cannot be read, is not an intact trace file of this version, or
            repeats a name of another.
    """

    def __init__(self, path: str | os.PathLike[str], *more: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        """The first file."""
        self.num_bytes = 0
        """Size of all files."""
        self._places: dict[str, tuple[Path, memoryview, FramePlace]] = {}
        for each in map(Path, (path, *more)):
            stored = map_file(each)
            self.num_bytes += len(stored)
            for place in read_index(stored, str(each)):
                if place.name in self._places:
                    raise CodecError(
                        f"{each} holds a trace {place.name!r}, and so does {self._places[place.name][0]}; expected every "
                        "name once: two writers sampled the same request"
                    )
                self._places[place.name] = each, stored, place

    def __len__(self) -> int:
        return len(self._places)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the traces, in the order in which they were written."""
        return tuple(self._places)

    def place(self, name: str) -> FramePlace:
        """Return where a trace lies in its file, and its checksum."""
        return self._find(name)[2]

    def header(self, name: str) -> TraceHeader:
        """Return what a trace's header says; only `read` compares it with the checksum."""
        path, stored, place = self._find(name)
        return read_header(stored[place.start : place.stop], f"{path}, trace {name!r}")[0]

    def read(self, name: str, *, max_bytes: int = DEFAULT_MAX_BYTES) -> RoutingTrace:
        """Return a trace, checked from the first byte to the last.

        Raises:
            CodecError: when its bytes were altered, or it takes more than ``max_bytes`` in memory.
        """
        path, stored, place = self._find(name)
        return read_place(stored, place, str(path), max_bytes=max_bytes)

    def items(self, *, max_bytes: int = DEFAULT_MAX_BYTES) -> Iterator[tuple[str, RoutingTrace]]:
        """Yield every trace with its name; ``max_bytes`` limits each of them."""
        for name in self.names:
            yield name, self.read(name, max_bytes=max_bytes)

    def _find(self, name: str) -> tuple[Path, memoryview, FramePlace]:
        if name not in self._places:
            raise CodecError(
                f"{self.path} holds no trace {name!r}; it holds {len(self)}: {list(self.names[:8])}"
            )
        return self._places[name]


def map_file(path: Path) -> memoryview:
    """Return the bytes of a file as a mapping: the system reads a page when it is used, once.

    Raises:
        CodecError: when it cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            # A mapping of nothing cannot be made.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    except OSError as error:
        raise CodecError(f"cannot read {path}: {error}") from error
    return memoryview(mapped)
