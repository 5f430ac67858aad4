"""The writer of one shard of a rollout: if it is killed, its groups stay and the next one resumes.

A group's traces reach the disk before its record does, so a record never names missing traces. What
a kill leaves after the last record, half a record or traces without one, is cut off and counted.

In: a manifest that was begun, groups. Out: a shard's two files.
"""

from __future__ import annotations

import fcntl
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from moe_replay.engines.checks import check_group
from moe_replay.engines.files.format import read_manifest, shard_file, shard_files, shard_number
from moe_replay.engines.files.group_log import (
    PREAMBLE,
    find_groups,
    is_intact,
    pack_group,
    read_group,
    trace_name,
)
from moe_replay.engines.types import Request, RolloutGroup
from moe_replay.errors import CodecError, RecipeError
from moe_replay.routing import Encoding
from moe_replay.routing.format.codec import FramePlace
from moe_replay.routing.format.trace_file import TraceWriter, map_file


class RolloutWriter:
    """Appends to the shard of one rank, and owns shards whose rank no longer exists.

    Of 8 shards that 3 ranks resume, rank 1 writes shard 1 and owns shards 4 and 7. Close it in the
    end; as a context manager it closes itself.

    Examples:
        >>> with RolloutWriter(begin_rollout(folder, manifest)) as writer:
        ...     for group in engine.generate(requests, sampling):
        ...         writer.write(group)
        ...     writer.finish()

    Raises:
        RecipeError: when another process writes a shard, or a file cannot be written.
        CodecError: when what is there was altered.
    """

    def __init__(self, manifest: Path, *, rank: int = 0, num_ranks: int = 1) -> None:
        self._description = read_manifest(manifest).engine
        self.num_cut_bytes = 0
        """Bytes that a kill had left after the last complete group."""
        self._closing = ExitStack()
        own = shard_file(manifest, rank)
        left = [s for s in shard_files(manifest, ".groups") if shard_number(s) % num_ranks == rank]
        try:
            self._shards = [self._open(path) for path in sorted({own, *left}, key=shard_number)]
        except BaseException:
            self._closing.close()
            raise
        self._own = next(shard for shard in self._shards if shard.path == own)

    def __enter__(self) -> RolloutWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def kept(self) -> tuple[int, ...]:
        """Requests that were there already, in the shards of this rank."""
        return tuple(number for shard in self._shards for number in shard.kept)

    def kept_requests(self) -> Iterator[Request]:
        """Yield them as they were asked, prompts included."""
        for shard in self._shards:
            yield from shard.kept_requests()

    def write(self, group: RolloutGroup) -> None:
        """Write a group; once this returns, no kill loses it.

        Raises:
            EngineError: when it does not keep the contract of every engine.
            RecipeError: when the disk refuses.
        """
        check_group(group, self._description)
        self._own.append(group)

    def finish(self) -> None:
        """Write the indexes of the trace files, for `moe-replay inspect` and `compare`."""
        for shard in self._shards:
            shard.finish()

    def close(self) -> None:
        """Close the files as they are. Calling it twice is allowed."""
        self._closing.close()

    def _open(self, path: Path) -> _Shard:
        shard = _Shard(path, records_routes=self._description.records_routes)
        self._closing.callback(shard.close)
        self.num_cut_bytes += shard.num_cut_bytes
        return shard


class _Shard:
    """The two files of a shard, locked by this process."""

    def __init__(self, path: Path, *, records_routes: bool) -> None:
        self.path = path
        try:
            self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        except OSError as error:
            raise RecipeError(f"cannot write {path}: {error}") from error
        self._traces: TraceWriter | None = None
        try:
            self._lock()
            self._stored = map_file(path)
            places, end = self._read_kept()
            self.num_cut_bytes = len(self._stored) - end
            if records_routes:
                self._traces = TraceWriter(
                    path.with_suffix(".traces"), encoding=Encoding.ORDERED, places=places
                )
                self.num_cut_bytes += self._traces.num_cut_bytes
            self._cut(end)
        except BaseException:
            self.close()
            raise

    def kept_requests(self) -> Iterator[Request]:
        for start in self._starts:
            yield read_group(self._stored, start, str(self.path)).group.request

    def append(self, group: RolloutGroup) -> None:
        try:
            self._file.write(pack_group(group, self._append_traces(group)))
            self._sync()
        except OSError as error:
            raise RecipeError(
                f"cannot write {self.path}: {error}; make room, then the same command resumes"
            ) from error

    def finish(self) -> None:
        if self._traces is not None:
            self._traces.finish()

    def close(self) -> None:
        if self._traces is not None:
            self._traces.close()
        self._file.close()

    def _append_traces(self, group: RolloutGroup) -> list[FramePlace | None]:
        places: list[FramePlace | None] = [None] * len(group.completions)
        if self._traces is None:
            return places
        for number, completion in enumerate(group.completions):
            assert completion.trace is not None
            name = trace_name(group.request.request_id, number)
            places[number] = self._traces.append(name, completion.trace)
        self._traces.sync()
        return places

    def _lock(self) -> None:
        try:
            # A record lock would be lost when any descriptor of the file is closed, and mapping it
            # closes one.
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RecipeError(
                f"{self.path} is being written by another process: wait for it, end it, or choose "
                "another folder"
            ) from error
        except OSError:
            # A file system without locks. The requests that both hold then show two writers.
            return

    def _read_kept(self) -> tuple[list[FramePlace], int]:
        """Read every record that is there, and return where their traces lie and where they end."""
        found = find_groups(self._stored, str(self.path))
        starts, end = found.starts.tolist(), found.end
        if starts and not is_intact(self._stored, starts[-1]):
            # A power cut may leave the last record with its full length and without its bytes.
            end = starts.pop()
        self._starts, self.kept = starts, found.request_ids.tolist()[: len(starts)]
        stored = (read_group(self._stored, start, str(self.path)) for start in starts)
        return [place for each in stored for place in each.places if place is not None], end

    def _cut(self, end: int) -> None:
        """Cut off what follows the last complete record; an empty file gets its first bytes."""
        self._file.truncate(end)
        self._file.seek(0, os.SEEK_END)
        if end < len(PREAMBLE):
            self._file.truncate(0)
            self._file.seek(0)
            self._file.write(PREAMBLE)
        self._sync()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())


def union_of(kept: Sequence[Sequence[int]], where: str) -> set[int]:
    """Return the requests that the ranks found, each once.

    Raises:
        CodecError: when two shards hold the same one.
    """
    counts = Counter(number for part in kept for number in part)
    twice = sorted(number for number, count in counts.items() if count > 1)
    if twice:
        raise CodecError(
            f"{where}: several shards hold requests {twice[:8]}: two commands sampled it at the same "
            "time on a file system without locks; remove it and sample it again"
        )
    return set(counts)
