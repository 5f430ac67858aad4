"""The form of traces on a wire and on disk: versioned, checksummed, refused when altered.

A payload is a preamble, one frame for each trace (`frame`), and an index with names and checksums.
Nothing is unpickled, nothing is trusted: every size is compared with the bytes that are there
before memory is taken for it.
"""

from __future__ import annotations

import base64
import binascii
import io
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from moe_replay.errors import CodecError
from moe_replay.routing.format.frame import (
    ALIGNMENT,
    CHECKSUM_BYTES,
    Encoding,
    checksum_of,
    read_frame,
    write_frame,
)
from moe_replay.routing.trace import RoutingTrace

FORMAT_VERSION = 1
"""Version of the bytes; a reader refuses every other one."""
DEFAULT_MAX_BYTES = 1 << 32
"""Memory that decoded traces may take unless the caller says otherwise."""

_MAGIC = b"\x93MOETRC\n"
_PREAMBLE = struct.Struct("<8sHHI")
_ENTRY = struct.Struct(f"<QQ{CHECKSUM_BYTES}sH")
_FOOTER = struct.Struct(f"<QI4s{CHECKSUM_BYTES}s")
_FOOTER_MAGIC = b"TEND"
_CHECKED = _FOOTER.size - CHECKSUM_BYTES

PREAMBLE = _PREAMBLE.pack(_MAGIC, FORMAT_VERSION, 0, 0)
"""First bytes of every payload; the first frame follows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FramePlace:
    """Where one trace of a payload lies."""

    name: str
    """Unique in its payload."""
    start: int
    """First byte of the frame."""
    stop: int
    """One past its last byte, the checksum included."""
    checksum: bytes
    """Start of the SHA-256 of the frame."""


def encode_traces(
    traces: Mapping[str, RoutingTrace], *, encoding: Encoding = Encoding.COMPACT
) -> bytes:
    """Return one payload of several named traces, such as those of a step.

    `Encoding.COMPACT` sorts the experts of each set; `Encoding.ORDERED` keeps them as recorded.

    Raises:
        CodecError: when a name or a number does not fit the format.
    """
    payload = io.BytesIO()
    write_payload(traces.items(), encoding, payload.write)
    return payload.getvalue()


def decode_traces(
    payload: bytes | bytearray | memoryview, *, max_bytes: int = DEFAULT_MAX_BYTES
) -> dict[str, RoutingTrace]:
    """Return the traces of a payload by name, in the order in which they were encoded.

    ``max_bytes`` limits the memory of all traces together. Raw routes stay a read-only view of
    ``payload``.

    Raises:
        CodecError: when the payload is not an intact one of this version, or larger than
            ``max_bytes``.
    """
    stored = memoryview(payload).cast("B")
    traces: dict[str, RoutingTrace] = {}
    for place in read_index(stored, "payload"):
        traces[place.name] = trace = read_place(stored, place, "payload", max_bytes=max_bytes)
        max_bytes -= trace.expert_ids.nbytes + trace.token_digest.nbytes + trace.valid.nbytes
    return traces


def encode_trace(trace: RoutingTrace, *, encoding: Encoding = Encoding.COMPACT) -> bytes:
    """Return the payload of a single trace: one like any other, with a trace named ``trace``."""
    return encode_traces({"trace": trace}, encoding=encoding)


def decode_trace(
    payload: bytes | bytearray | memoryview, *, max_bytes: int = DEFAULT_MAX_BYTES
) -> RoutingTrace:
    """Return the trace of a payload that holds exactly one.

    Raises:
        CodecError: as `decode_traces`, and when the payload holds none or several traces.
    """
    stored = memoryview(payload).cast("B")
    places = read_index(stored, "payload")
    if len(places) != 1:
        names = [place.name for place in places[:8]]
        raise CodecError(
            f"payload: holds {len(places)} traces {names}, expected one; decode_traces returns all of them"
        )
    return read_place(stored, places[0], "payload", max_bytes=max_bytes)


def to_text(payload: bytes) -> str:
    """Return a payload as base64, for a field of a JSON message; a third longer."""
    return base64.b64encode(payload).decode()


def from_text(text: str) -> bytes:
    """Return the payload in a field of a JSON message.

    Raises:
        CodecError: when the text is not the base64 that `to_text` writes.
    """
    try:
        payload = binascii.a2b_base64(text, strict_mode=True)
    except ValueError as error:
        raise CodecError(
            f"a text of {len(text)} characters is not valid base64 of a payload ({error}); it was cut off or altered, or "
            "written in another alphabet: use to_text"
        ) from error
    # The last character may hold bits that belong to no byte; altered, they would go unnoticed.
    if text[-4:] != to_text(payload[(len(payload) - 1) // 3 * 3 :]):
        raise CodecError("the last characters of a base64 text were altered: use to_text")
    return payload


def write_payload(
    traces: Iterable[tuple[str, RoutingTrace]],
    encoding: Encoding,
    write: Callable[[bytes | memoryview], object],
) -> list[FramePlace]:
    """Pass a payload to ``write`` in pieces, of which one is held beside the traces.

    Raises:
        CodecError: when a name is empty, repeated or too long, or a number does not fit the format.
    """
    write(PREAMBLE)
    places: list[FramePlace] = []
    names: set[str] = set()
    at = len(PREAMBLE)
    for name, trace in traces:
        places.append(write_named(name, trace, encoding, write, at=at, taken=names))
        at = places[-1].stop
    write(pack_index(places))
    return places


def write_named(
    name: str,
    trace: RoutingTrace,
    encoding: Encoding,
    write: Callable[[bytes | memoryview], object],
    *,
    at: int,
    taken: set[str],
) -> FramePlace:
    """Write one frame, which begins at byte ``at`` of its payload, and add its name to ``taken``.

    Raises:
        CodecError: when the name is empty, repeated or too long, or a number does not fit the
            format.
    """
    _check_name(name, taken)
    size, checksum = write_frame(trace, encoding, write)
    taken.add(name)
    return FramePlace(name=name, start=at, stop=at + size, checksum=checksum)


def pack_index(places: Sequence[FramePlace]) -> bytes:
    """Return index and footer of a payload whose frames are at ``places``."""
    entries = [
        _ENTRY.pack(place.start, place.stop - place.start, place.checksum, len(place.name.encode()))
        + place.name.encode()
        for place in places
    ]
    at = places[-1].stop if places else len(PREAMBLE)
    index = b"".join(entries)
    footer = _FOOTER.pack(at, len(entries), _FOOTER_MAGIC, bytes(CHECKSUM_BYTES))[:_CHECKED]
    return index + footer + checksum_of(PREAMBLE + index + footer)


def read_index(stored: memoryview, where: str) -> list[FramePlace]:
    """Return where each trace of a payload lies, after checking preamble, index and footer.

    Raises:
        CodecError: when they are not those of an intact payload of this version. Frames are checked
            when they are read.
    """
    _check_preamble(stored, where)
    footer = stored[len(stored) - _FOOTER.size :]
    index_at, num_traces, magic, checksum = _FOOTER.unpack(footer)
    end = len(stored) - _FOOTER.size
    if magic != _FOOTER_MAGIC or not _PREAMBLE.size <= index_at <= end:
        raise CodecError(
            f"{where}: {len(stored)} bytes that do not end as a payload does; cut off in transport, or the writer died"
        )
    index = stored[index_at:end]
    if checksum_of(b"".join([stored[: _PREAMBLE.size], index, footer[:_CHECKED]])) != checksum:
        raise CodecError(f"{where}: the checksum does not fit the index: bytes were altered")
    places: list[FramePlace] = []
    names: set[str] = set()
    at, expected = 0, _PREAMBLE.size
    for number in range(num_traces):
        if len(index) - at < _ENTRY.size:
            raise CodecError(f"{where}: the index ends before entry {number} of {num_traces}")
        start, size, frame_checksum, name_bytes = _ENTRY.unpack_from(index, at)
        at += _ENTRY.size
        if start != expected or size % ALIGNMENT or not size or start + size > index_at:
            raise CodecError(
                f"{where}: entry {number} places a trace at bytes {start}:{start + size}, expected the start "
                f"{expected}, a multiple of {ALIGNMENT} as size, and an end before the index at {index_at}"
            )
        name = _decoded_name(
            index[at : at + name_bytes], name_bytes, names, f"{where}, entry {number}"
        )
        at += name_bytes
        expected = start + size
        names.add(name)
        places.append(FramePlace(name=name, start=start, stop=expected, checksum=frame_checksum))
    if at != len(index) or expected != index_at:
        raise CodecError(
            f"{where}: {len(index) - at} bytes of the index and {index_at - expected} bytes before it belong to no trace"
        )
    return places


def read_place(
    stored: memoryview, place: FramePlace, where: str, *, max_bytes: int
) -> RoutingTrace:
    """Return the trace at ``place``.

    Raises:
        CodecError: as `frame.read_frame`, and when the frame is intact but another one than the
            index names.
    """
    frame = stored[place.start : place.stop]
    if frame[-CHECKSUM_BYTES:] != place.checksum:
        raise CodecError(
            f"{where}, trace {place.name!r}: its checksum is not the one in the index; it was altered or replaced"
        )
    return read_frame(frame, f"{where}, trace {place.name!r}", max_bytes=max_bytes)


def _check_preamble(stored: memoryview, where: str) -> None:
    minimum = _PREAMBLE.size + _FOOTER.size
    if len(stored) < minimum:
        raise CodecError(
            f"{where}: {len(stored)} bytes, expected at least {minimum}: empty, or cut off in transport"
        )
    magic, version, *reserved = _PREAMBLE.unpack_from(stored)
    if magic != _MAGIC:
        raise CodecError(
            f"{where}: starts with {magic.hex(' ')}, expected {_MAGIC.hex(' ')}: these bytes are not traces, or were "
            "still in a text form: use from_text"
        )
    if version != FORMAT_VERSION:
        raise CodecError(
            f"{where}: format version {version}, this reader knows {FORMAT_VERSION}: written by another release of "
            "moe-replay; use the same one on both sides"
        )
    if any(reserved):
        raise CodecError(f"{where}: reserved bytes hold {reserved}, expected zeros")


def _check_name(name: str, taken: set[str]) -> None:
    try:
        size = len(name.encode())
    except UnicodeEncodeError as error:
        raise CodecError(f"trace name {name!r} is not valid text: {error}") from error
    if not 1 <= size < 1 << 16 or name in taken:
        raise CodecError(
            f"trace name {name[:80]!r} is {'taken' if name in taken else f'{size} bytes long'}; expected a name of its own "
            "for each trace, of 1 to 65535 bytes"
        )


def _decoded_name(encoded: memoryview, size: int, taken: set[str], where: str) -> str:
    try:
        name = str(encoded, "utf-8")
    except UnicodeDecodeError as error:
        raise CodecError(f"{where}: the name is not valid UTF-8: {error}") from error
    if len(encoded) != size or not name or name in taken:
        raise CodecError(
            f"{where}: the name {name[:80]!r} is cut off, empty or not the only one of its kind"
        )
    return name
