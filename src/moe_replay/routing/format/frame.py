"""The bytes of one trace: header, valid rows, tokens, routes, checksum; see docs/trace-format.md.

Tokens travel as the ids that the rolling digest was made of, in as few bytes as the largest needs:
three for every vocabulary in use where the digest takes eight, and nothing is lost, because the
digest can be undone (`recover_tokens`).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from moe_replay.errors import CodecError, TraceError
from moe_replay.routing.arrays import owned
from moe_replay.routing.digest import digest_tokens, recover_tokens
from moe_replay.routing.form import expert_dtype
from moe_replay.routing.format.set_coding import (
    chunk_size,
    decode_chunk,
    encode_chunk,
    new_compressor,
    new_decompressor,
)
from moe_replay.routing.origin import Origin, PolicySpan
from moe_replay.routing.slots import row_chunks
from moe_replay.routing.trace import RoutingTrace

if TYPE_CHECKING:
    from jaxtyping import Bool, UInt, UInt8, UInt64

ALIGNMENT = 16
"""Frames, and the routes inside them, start at multiples of this many bytes."""
CHECKSUM_BYTES = 16
"""Length of a checksum: the start of a SHA-256."""

_MAGIC = b"RTRC"
_FIXED = struct.Struct("<4sBBBBIIIIIIHHI")
# Rows without a route are left out up to this width. A few bytes of token then stand for at most
# this many zeros, so a small payload cannot ask for much memory; wider rows carry their zeros.
_WIDEST_ROW_LEFT_OUT = 4096


class Encoding(StrEnum):
    """How the routes of a frame are stored."""

    RAW = "raw"
    """Every row in C order, one or two bytes an id; can be memory-mapped."""
    COMPACT = "compact"
    """Sets without their order, at two thirds of raw or less: each set comes back increasing."""
    ORDERED = "ordered"
    """As compact, but in the order of recording, which costs ``log2(k!)`` bits a set."""


_CODES = (Encoding.RAW, Encoding.COMPACT, Encoding.ORDERED)


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceHeader:
    """What a frame says about its trace before any route is read."""

    encoding: Encoding
    """How the routes are stored."""
    num_rows: int
    """Rows of the trace."""
    num_valid: int
    """Rows that hold routes."""
    layers: tuple[int, ...]
    """Global decoder indices."""
    topk: int
    """Experts per token and layer."""
    num_experts: int
    """Routed experts in each layer of the model."""
    origin: Origin
    """Who recorded the routes, and under which weights."""
    token_bytes: int
    """Bytes that hold one token id."""

    @property
    def row_bytes(self) -> int:
        """Bytes of the routes of one row in memory."""
        return len(self.layers) * self.topk * expert_dtype(self.num_experts).itemsize

    @property
    def decoded_bytes(self) -> int:
        """Memory that the trace takes: routes, digest and valid flag of every row."""
        return self.num_rows * (self.row_bytes + 9)

    @property
    def leaves_rows_out(self) -> bool:
        """Whether rows with ``valid=False`` take no bytes among the routes."""
        return self.encoding is not Encoding.RAW and self.row_bytes <= _WIDEST_ROW_LEFT_OUT


def checksum_of(piece: bytes | memoryview) -> bytes:
    """Return the start of the SHA-256 of a piece."""
    return hashlib.sha256(piece).digest()[:CHECKSUM_BYTES]


def write_frame(
    trace: RoutingTrace, encoding: Encoding, write: Callable[[bytes | memoryview], object]
) -> tuple[int, bytes]:
    """Pass the bytes of ``trace`` to ``write``, a chunk of rows at a time; return size, checksum.

    Raises:
        CodecError: when a count, a policy version or a name does not fit its field.
    """
    checksum = hashlib.sha256()
    size = 0

    def put(piece: bytes | memoryview) -> None:
        nonlocal size
        checksum.update(piece)
        write(piece)
        size += len(piece) if isinstance(piece, bytes) else piece.nbytes

    tokens = recover_tokens(trace.token_digest)
    header = TraceHeader(
        encoding=encoding,
        num_rows=len(trace),
        num_valid=trace.num_valid,
        layers=trace.layers,
        topk=trace.topk,
        num_experts=trace.num_experts,
        origin=trace.origin,
        token_bytes=max(1, -(-int(tokens.max(initial=0)).bit_length() // 8)),
    )
    put(_pack_header(header))
    put(np.packbits(trace.valid, bitorder="little").tobytes())
    put(_token_columns(tokens)[:, : header.token_bytes].tobytes())
    put(bytes(-size % ALIGNMENT))
    for piece in _route_pieces(trace, header):
        put(piece)
    put(bytes(-size % ALIGNMENT))
    digest = checksum.digest()[:CHECKSUM_BYTES]
    write(digest)
    return size + CHECKSUM_BYTES, digest


def read_header(frame: memoryview, where: str) -> tuple[TraceHeader, int]:
    """Return the header at the start of ``frame`` and its length; no checksum is checked.

    Raises:
        CodecError: when the header is cut off, or holds impossible values.
    """
    if len(frame) < _FIXED.size:
        raise CodecError(f"{where}: {len(frame)} bytes, a trace starts with {_FIXED.size}")
    magic, code, itemsize, token_bytes, reserved, *counts = _FIXED.unpack_from(frame)
    rows, valid, num_layers, topk, experts, num_spans, engine, version, more = counts
    if magic != _MAGIC or code >= len(_CODES) or reserved or more or not 1 <= token_bytes <= 8:
        raise CodecError(
            f"{where}: starts with {bytes(frame[:8]).hex(' ')}, expected {_MAGIC.hex(' ')}, an encoding below "
            f"{len(_CODES)}, an item size, 1 to 8 bytes a token and zeros where nothing is defined: these bytes are "
            "not a trace of this version"
        )
    end = _FIXED.size + 4 * num_layers + 12 * num_spans + engine + version
    if end > len(frame):
        raise CodecError(f"{where}: a header of {end} bytes, {len(frame)} are there: cut off")
    columns = struct.Struct(f"<{num_layers}I{num_spans}I{num_spans}q")
    lists = columns.unpack_from(frame, _FIXED.size)
    stops = lists[num_layers : num_layers + num_spans]
    spans = tuple(
        PolicySpan(start=start, stop=stop, policy_version=policy_version)
        for start, stop, policy_version in zip(
            (0, *stops)[:num_spans], stops, lists[num_layers + num_spans :], strict=True
        )
    )
    at = _FIXED.size + columns.size
    try:
        header = TraceHeader(
            encoding=_CODES[code],
            num_rows=rows,
            num_valid=valid,
            layers=lists[:num_layers],
            topk=topk,
            num_experts=experts,
            origin=Origin(
                engine=str(frame[at : at + engine], "utf-8"),
                engine_version=str(frame[at + engine : end], "utf-8"),
                spans=spans,
            ),
            token_bytes=token_bytes,
        )
        wanted = expert_dtype(experts).itemsize
    except (TraceError, UnicodeDecodeError) as error:
        raise CodecError(f"{where}: the header holds impossible values: {error}") from error
    if itemsize != wanted or not num_layers or not topk or valid > rows:
        raise CodecError(
            f"{where}: {itemsize} bytes an id, {num_layers} layers, top-{topk}, {valid} of {rows} rows valid; expected "
            f"{wanted} bytes for {experts} experts, at least one layer and slot, and no more valid rows than rows"
        )
    return header, end


def read_frame(frame: memoryview, where: str, *, max_bytes: int) -> RoutingTrace:
    """Check a frame and return its trace; ``max_bytes`` limits what it may take in memory.

    Memory grows only as far as the bytes present prove: at most `set_coding.MAX_EXPANSION` expert
    slots a stored byte. Raw routes are a view of ``frame``.

    Raises:
        CodecError: when the bytes are not an intact trace of this version, or it is larger than
            ``max_bytes``.
    """
    end = len(frame) - CHECKSUM_BYTES
    if end < 0 or checksum_of(frame[:end]) != frame[end:]:
        raise CodecError(
            f"{where}: the checksum does not fit the {len(frame)} bytes; they were altered or cut off in transport or "
            "on disk: send or write the trace again"
        )
    header, at = read_header(frame, where)
    if header.decoded_bytes > max_bytes:
        raise CodecError(
            f"{where}: {header.num_rows} rows of {len(header.layers)} layers, top-{header.topk}, take "
            f"{header.decoded_bytes} bytes, max_bytes is {max_bytes}: raise the limit if the sender can be trusted"
        )
    num_flags, num_token_bytes = -(-header.num_rows // 8), header.num_rows * header.token_bytes
    routes_at = at + num_flags + num_token_bytes
    routes_at += -routes_at % ALIGNMENT
    if routes_at > end:
        raise CodecError(
            f"{where}: {header.num_rows} rows need {num_flags + num_token_bytes} bytes of flags and tokens, "
            f"{end - at} are left"
        )
    valid = _read_valid(frame[at : at + num_flags], header, where)
    tokens = _read_tokens(frame[at + num_flags :][:num_token_bytes], header)
    _check_zeros(frame[at + num_flags + num_token_bytes : routes_at], where)
    routes = _read_routes(frame[routes_at:end], header, valid, where)
    try:
        return RoutingTrace(
            expert_ids=routes,
            valid=valid,
            layers=header.layers,
            num_experts=header.num_experts,
            token_digest=owned(digest_tokens(tokens)),
            origin=header.origin,
        )
    except TraceError as error:
        raise CodecError(f"{where}: intact bytes of an impossible trace: {error}") from error


def _pack_header(header: TraceHeader) -> bytes:
    origin = header.origin
    try:
        names = [origin.engine.encode(), origin.engine_version.encode()]
        fixed = _FIXED.pack(
            _MAGIC,
            _CODES.index(header.encoding),
            expert_dtype(header.num_experts).itemsize,
            header.token_bytes,
            0,
            header.num_rows,
            header.num_valid,
            len(header.layers),
            header.topk,
            header.num_experts,
            len(origin.spans),
            *map(len, names),
            0,
        )
        columns = struct.pack(
            f"<{len(header.layers)}I{len(origin.spans)}I{len(origin.spans)}q",
            *header.layers,
            *(span.stop for span in origin.spans),
            *(span.policy_version for span in origin.spans),
        )
    except (struct.error, UnicodeEncodeError) as error:
        raise CodecError(
            f"a trace of {header.num_rows} rows, layers {list(header.layers)} and {origin} does not fit the format "
            f"({error}): rows and layers must be below 2**32, policy versions below 2**63, names below 2**16 bytes of UTF-8"
        ) from error
    return b"".join([fixed, columns, *names])


def _token_columns(tokens: UInt64[np.ndarray, " rows"]) -> UInt8[np.ndarray, "rows 8"]:
    return tokens.astype("<u8", copy=False).view(np.uint8).reshape(-1, 8)


def _route_pieces(trace: RoutingTrace, header: TraceHeader) -> Iterator[bytes | memoryview]:
    compressor = None if header.encoding is Encoding.RAW else new_compressor()
    for rows in row_chunks(*trace.expert_ids.shape):
        ids, held = trace.expert_ids[rows], trace.valid[rows]
        if not held.all():
            # What an invalid row holds has no meaning, so it must not travel.
            ids = ids[held] if header.leaves_rows_out else np.where(held[:, None, None], ids, 0)
        if compressor is None:
            yield np.ascontiguousarray(ids.astype(ids.dtype.newbyteorder("<"), copy=False)).data
        elif len(ids):
            keep_order = _keeps_order(header, held)
            yield encode_chunk(ids, header.num_experts, compressor, keep_order=keep_order)


def _keeps_order(header: TraceHeader, valid: Bool[np.ndarray, " rows"]) -> bool:
    """Whether a chunk keeps the order of ids: as asked, or because rows of zeros are not sets."""
    return header.encoding is Encoding.ORDERED or not (header.leaves_rows_out or valid.all())


def _read_valid(flags: memoryview, header: TraceHeader, where: str) -> Bool[np.ndarray, " rows"]:
    bits = owned(np.unpackbits(np.frombuffer(flags, dtype=np.uint8), bitorder="little").view(bool))
    valid = bits[: header.num_rows]
    if int(valid.sum()) != header.num_valid or bits[header.num_rows :].any():
        raise CodecError(
            f"{where}: {int(bits.sum())} valid flags are set, the header says {header.num_valid} among "
            f"{header.num_rows} rows: flags and header belong to different traces"
        )
    return valid


def _read_tokens(stored: memoryview, header: TraceHeader) -> UInt64[np.ndarray, " rows"]:
    columns = np.zeros((header.num_rows, 8), dtype=np.uint8)
    columns[:, : header.token_bytes] = np.frombuffer(stored, dtype=np.uint8).reshape(
        header.num_rows, header.token_bytes
    )
    return columns.view("<u8").reshape(-1)


def _read_routes(
    stored: memoryview, header: TraceHeader, valid: Bool[np.ndarray, " rows"], where: str
) -> UInt[np.ndarray, "rows layers topk"]:
    shape = (header.num_rows, len(header.layers), header.topk)
    dtype = expert_dtype(header.num_experts)
    if header.encoding is Encoding.RAW:
        end = header.num_rows * header.row_bytes
        _check_rest(stored, end, where)
        return np.frombuffer(stored[:end], dtype=dtype.newbyteorder("<")).reshape(shape)
    chunks = []
    at = 0
    for rows in row_chunks(*shape):
        held = valid[rows] if header.leaves_rows_out else np.ones(rows.stop - rows.start, bool)
        num_slots = int(held.sum()) * shape[1] * shape[2]
        if num_slots:
            size = chunk_size(
                stored[at:], num_slots, header.num_experts, f"{where}, row {rows.start}"
            )
            chunks.append((rows, held, stored[at : at + size]))
            at += size
    _check_rest(stored, at, where)
    # Every chunk has proven by its size that its routes can be there; only now is memory taken for
    # them.
    ids, decompressor = np.zeros(shape, dtype=dtype), new_decompressor()
    for rows, held, chunk in chunks:
        part = ids[rows] if held.all() else np.empty((int(held.sum()), *shape[1:]), dtype=dtype)
        decode_chunk(
            chunk,
            part,
            header.num_experts,
            decompressor,
            keep_order=_keeps_order(header, valid[rows]),
            where=f"{where}, row {rows.start}",
        )
        if not held.all():
            ids[rows][held] = part
    return owned(ids)


def _check_rest(stored: memoryview, end: int, where: str) -> None:
    if not end <= len(stored) < end + ALIGNMENT:
        raise CodecError(
            f"{where}: {len(stored)} bytes of routes, expected {end} and at most {ALIGNMENT - 1} of padding: the header "
            "and the routes belong to different traces"
        )
    _check_zeros(stored[end:], where)


def _check_zeros(padding: memoryview, where: str) -> None:
    if any(padding):
        raise CodecError(f"{where}: the padding holds {bytes(padding).hex(' ')}, expected zeros")
