"""The bytes of a groups file: a record a prompt with its completions, found by headers alone.

A record names where the traces of its completions lie in the trace file beside it, and ends with a
checksum. All numbers are little-endian; `docs/engines.md` draws the files. For a prompt of 3 tokens
and completions of 5 and 2 tokens::

    header      32 bytes  "GRUP", 2 completions, request id, size of the record, 3 prompt tokens
    entries   2 x 56      tokens, finish reason, policy version, start, stop and checksum of its
                          trace, length of its server's name, number of its candidates
    prompt     3 x  4     int32
    tokens     7 x  4     int32, completion after completion
    logprobs   7 x  4     float32, likewise
    candidates            of each completion that has some: counts, ids, kept mass (int32, uint32,
                          float32; 5 x 4, as many as the entry says x 4, 5 x 4)
    servers               UTF-8, completion after completion
    zeros                 up to a multiple of 16
    checksum   16 bytes   start of the SHA-256 of all of the above

In: RolloutGroups and places of traces. Out: bytes; and back.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, UInt64

from moe_replay.engines.types import Completion, FinishReason, Request, RolloutGroup
from moe_replay.errors import CodecError
from moe_replay.routing.candidates import Candidates
from moe_replay.routing.format.codec import FramePlace

FORMAT = 3
"""Version of rollouts on disk; a reader refuses every other one."""
CHECKSUM_BYTES = 16
"""Length of a record's checksum."""

_RECORD_MAGIC = b"GRUP"
_HEADER = struct.Struct("<4sIQQII")
_ENTRY = struct.Struct("<IBBHqQQ16sQ")
# Flags of an entry.
_HAS_TRACE, _HAS_CANDIDATES = 1, 2
_NO_CHECKSUM = bytes(16)
_REASONS = tuple(FinishReason)

PREAMBLE = struct.pack("<8sHHI", b"\x93MOEGRP\n", FORMAT, 0, 0)
"""First bytes of every groups file; the first record follows."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FoundGroups:
    """The records of a groups file, found by their headers."""

    request_ids: UInt64[np.ndarray, " groups"]
    """In the order in which they were written."""
    starts: Int64[np.ndarray, " groups"]
    """First byte of each record."""
    end: int
    """One past the last complete record; what follows, its writer could not finish."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredGroup:
    """A record, read and checked."""

    group: RolloutGroup
    """The completions, without their traces."""
    places: tuple[FramePlace | None, ...]
    """Where the trace of each lies; None for a completion without one."""


def trace_name(request_id: int, number: int) -> str:
    """Return the name of a completion's trace in its trace file."""
    return f"{request_id}/{number}"


def pack_group(group: RolloutGroup, places: Sequence[FramePlace | None]) -> bytes:
    """Return the record of a group whose traces lie at ``places``."""
    completions = group.completions
    servers = [completion.server.encode() for completion in completions]
    entries = b"".join(
        _ENTRY.pack(
            len(completion.token_ids),
            _REASONS.index(completion.finish_reason),
            (_HAS_TRACE if place else 0)
            | (0 if completion.candidates is None else _HAS_CANDIDATES),
            len(server),
            completion.policy_version,
            place.start if place else 0,
            place.stop if place else 0,
            place.checksum if place else _NO_CHECKSUM,
            0 if completion.candidates is None else len(completion.candidates.ids),
        )
        for completion, place, server in zip(completions, places, servers, strict=True)
    )
    body = b"".join(
        [
            entries,
            group.request.prompt_ids.astype("<i4").tobytes(),
            *(completion.token_ids.astype("<i4").tobytes() for completion in completions),
            *(completion.rollout_logprobs.astype("<f4").tobytes() for completion in completions),
            *(_candidate_bytes(c.candidates) for c in completions if c.candidates is not None),
            *servers,
        ]
    )
    body += bytes(-len(body) % 16)
    header = _HEADER.pack(
        _RECORD_MAGIC,
        len(completions),
        group.request.request_id,
        _HEADER.size + len(body) + CHECKSUM_BYTES,
        len(group.request.prompt_ids),
        0,
    )
    return header + body + _checksum(header, body)


def find_groups(stored: memoryview, where: str) -> FoundGroups:
    """Return where the records of a groups file lie; of each only the header is read.

    Raises:
        CodecError: when the bytes are not a groups file of this version, or a header in the middle
            was altered.
    """
    request_ids: list[int] = []
    starts: list[int] = []
    begin = bytes(stored[: len(PREAMBLE)])
    if not PREAMBLE.startswith(begin):
        raise CodecError(
            f"{where}: begins {begin.hex(' ')}, expected {PREAMBLE.hex(' ')}: this is not a groups "
            f"file of format {FORMAT}; sample it again with `moe-replay rollout`"
        )
    # A file that was only begun holds no record.
    at = len(PREAMBLE) if begin == PREAMBLE else 0
    while len(stored) - at >= _HEADER.size:
        magic, _, request_id, size, _, reserved = _HEADER.unpack_from(stored, at)
        if magic != _RECORD_MAGIC or reserved or size % 16 or size < _HEADER.size + CHECKSUM_BYTES:
            # After a power cut a file may have grown by zeros that were never filled.
            if not np.frombuffer(stored[at:], np.uint8).any():
                break
            raise CodecError(
                f"{where}: byte {at} begins {bytes(stored[at : at + 8]).hex(' ')}, expected the "
                "record of a prompt: the file was altered; remove this rollout and sample it again"
            )
        if at + size > len(stored):
            break
        request_ids.append(request_id)
        starts.append(at)
        at += size
    return FoundGroups(
        request_ids=np.array(request_ids, dtype=np.uint64),
        starts=np.array(starts, dtype=np.int64),
        end=at,
    )


def is_intact(stored: memoryview, start: int) -> bool:
    """Return whether the record at ``start`` fits its checksum."""
    size = _HEADER.unpack_from(stored, start)[3]
    end = start + size - CHECKSUM_BYTES
    return _checksum(stored[start:end]) == stored[end : end + CHECKSUM_BYTES]


def read_group(stored: memoryview, start: int, where: str) -> StoredGroup:
    """Return the group of the record at ``start``, after its checksum; its arrays are copies.

    Raises:
        CodecError: when its bytes were altered.
    """
    _, num_completions, request_id, size, num_prompt, _ = _HEADER.unpack_from(stored, start)
    if not is_intact(stored, start):
        raise CodecError(
            f"{where}, request {request_id}: the checksum does not fit its {size} bytes; they were "
            "altered on the disk: remove this rollout and sample it again"
        )
    body = stored[start + _HEADER.size : start + size - CHECKSUM_BYTES]
    entries = [_ENTRY.unpack_from(body, _ENTRY.size * n) for n in range(num_completions)]
    lengths = np.array([entry[0] for entry in entries], dtype=np.int64)
    at = _ENTRY.size * num_completions
    prompt_ids = np.frombuffer(body, "<i4", num_prompt, at).astype(np.int32)
    at += prompt_ids.nbytes
    # Lengths 5 and 2 end at 5 and 7, which cuts 7 tokens into [0:5] and [5:7].
    stops = np.cumsum(lengths)
    total = int(stops[-1]) if num_completions else 0
    tokens = np.frombuffer(body, "<i4", total, at)
    logprobs = np.frombuffer(body, "<f4", total, at + tokens.nbytes)
    at += tokens.nbytes + logprobs.nbytes
    every: list[Candidates | None] = []
    for length, _, flags, *_, num_ids in entries:
        candidates = (
            _read_candidates(body, at, length, num_ids) if flags & _HAS_CANDIDATES else None
        )
        at += 0 if candidates is None else candidates.nbytes
        every.append(candidates)
    completions, places = [], []
    for number, (entry, stop) in enumerate(zip(entries, stops.tolist(), strict=True)):
        length, reason, flags, server_bytes, version, frame, frame_end, checksum, _ = entry
        completions.append(
            Completion(
                token_ids=tokens[stop - length : stop].astype(np.int32),
                rollout_logprobs=logprobs[stop - length : stop].astype(np.float32),
                trace=None,
                finish_reason=_REASONS[reason],
                policy_version=version,
                server=str(body[at : at + server_bytes], "utf-8"),
                candidates=every[number],
            )
        )
        at += server_bytes
        name = trace_name(request_id, number)
        place = FramePlace(name=name, start=frame, stop=frame_end, checksum=checksum)
        places.append(place if flags & _HAS_TRACE else None)
    request = Request(request_id=request_id, prompt_ids=prompt_ids, num_generations=num_completions)
    group = RolloutGroup(request=request, completions=tuple(completions))
    return StoredGroup(group=group, places=tuple(places))


def _candidate_bytes(candidates: Candidates) -> bytes:
    arrays = (candidates.counts, "<i4"), (candidates.ids, "<u4"), (candidates.kept_mass, "<f4")
    return b"".join(array.astype(dtype).tobytes() for array, dtype in arrays)


def _read_candidates(body: memoryview, at: int, num_tokens: int, num_ids: int) -> Candidates:
    counts = np.frombuffer(body, "<i4", num_tokens, at)
    ids = np.frombuffer(body, "<u4", num_ids, at + counts.nbytes)
    mass = np.frombuffer(body, "<f4", num_tokens, at + counts.nbytes + ids.nbytes)
    return Candidates(
        counts=counts.astype(np.int32),
        ids=ids.astype(np.uint32),
        kept_mass=mass.astype(np.float32),
    )


def _checksum(*pieces: bytes | memoryview) -> bytes:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.digest()[:CHECKSUM_BYTES]
