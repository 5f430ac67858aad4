"""Damaged and hostile payloads: what a bad wire, a full disk or a bad peer sends the codec.

Damage leaves the checksums as they are, so every damaged payload must be refused. Hostile payloads
carry checksums that fit what was altered; they must be refused too, or decode to traces that are
possible. The places in a payload are those of docs/trace-format.md, written down here a second
time.

In: an intact payload and a generator. Out: altered payloads.
"""

from __future__ import annotations

import hashlib
import random
import struct

_PREAMBLE_BYTES = 16
_CHECKSUM_BYTES = 16
_ENTRY = struct.Struct("<QQ16sH")
_FOOTER = struct.Struct("<QI4s16s")
# Offset and width of each field at the start of a frame.
_FIELDS = (
    *((place, 1) for place in range(4, 8)),
    *((place, 4) for place in range(8, 32, 4)),
    *((32, 2), (34, 2), (36, 4)),
)
_FIXED_BYTES = 40


def damaged(payload: bytes, rng: random.Random) -> bytes:
    """Return ``payload`` with bits flipped, bytes cut, inserted or exchanged; never unchanged."""
    while True:
        altered = bytearray(payload)
        for _ in range(rng.choice((1, 1, 1, 2, 8))):
            _alter(altered, rng)
        if altered != payload:
            return bytes(altered)


def hostile(payload: bytes, rng: random.Random) -> bytes:
    """Return ``payload`` with fields, routes or index altered, and checksums that fit."""
    parts = frames(payload)
    if not parts or rng.random() < 0.2:
        return with_fitting_checksums(damaged(payload, rng))
    number = rng.randrange(len(parts))
    name, body = parts[number]
    altered = bytearray(body)
    for _ in range(rng.choice((1, 1, 2, 3))):
        if rng.random() < 0.6:
            _set_field(altered, rng)
        else:
            _alter(altered, rng)
    parts[number] = (name, bytes(altered))
    return payload_of(parts)


def frames(payload: bytes) -> list[tuple[str, bytes]]:
    """Return name and bytes of each frame of an intact payload, without the frame's checksum."""
    index_at, count, _, _ = _FOOTER.unpack(payload[-_FOOTER.size :])
    found = []
    at = index_at
    for _ in range(count):
        start, size, _, name_bytes = _ENTRY.unpack_from(payload, at)
        at += _ENTRY.size
        body = payload[start : start + size - _CHECKSUM_BYTES]
        found.append((payload[at : at + name_bytes].decode(), body))
        at += name_bytes
    return found


def payload_of(parts: list[tuple[str, bytes]]) -> bytes:
    """Return the payload of the frames that `frames` took apart, padded and with checksums."""
    payload = bytearray(b"\x93MOETRC\n" + struct.pack("<HHI", 1, 0, 0))
    index = bytearray()
    for name, body in parts:
        padded = body + bytes(-len(body) % 16)
        checksum = _checksum(padded)
        index += _ENTRY.pack(len(payload), len(padded) + 16, checksum, len(name.encode()))
        index += name.encode()
        payload += padded + checksum
    footer = _FOOTER.pack(len(payload), len(parts), b"TEND", bytes(16))[:16]
    checksum = _checksum(payload[:_PREAMBLE_BYTES] + index + footer)
    return bytes(payload + index + footer + checksum)


def with_fitting_checksums(payload: bytes) -> bytes:
    """Return ``payload`` with every checksum that can be found computed again."""
    altered = bytearray(payload)
    if len(altered) < _PREAMBLE_BYTES + _FOOTER.size:
        return payload
    end = len(altered) - _FOOTER.size
    index_at, count, _, _ = _FOOTER.unpack(altered[end:])
    at = index_at
    for _ in range(count):
        if at + _ENTRY.size > end:
            break
        start, size, _, name_bytes = _ENTRY.unpack_from(altered, at)
        if _CHECKSUM_BYTES <= size <= end and start + size <= end:
            checksum = _checksum(altered[start : start + size - _CHECKSUM_BYTES])
            altered[start + size - _CHECKSUM_BYTES : start + size] = checksum
            altered[at + 16 : at + 32] = checksum
        at += _ENTRY.size + name_bytes
    covered = altered[:_PREAMBLE_BYTES] + altered[index_at:end] + altered[end : end + 16]
    altered[-_CHECKSUM_BYTES:] = _checksum(covered)
    return bytes(altered)


def _alter(altered: bytearray, rng: random.Random) -> None:
    size = len(altered)
    at = rng.randrange(size) if size else 0
    span = min(rng.choice((1, 2, 4, 16, 100)), size - at)
    kind = rng.randrange(8)
    if kind <= 2 and size:
        altered[at] ^= 1 << rng.randrange(8)
    elif kind == 3:
        altered[at : at + span] = rng.randbytes(span)
    elif kind == 4:
        del altered[at : at + span]
    elif kind == 5:
        altered[at:at] = altered[at : at + span] or b"\0"
    elif kind == 6:
        del altered[at:]
    else:
        other = rng.randrange(size) if size else 0
        altered[at : at + span], altered[other : other + span] = (
            altered[other : other + span],
            altered[at : at + span],
        )


def _set_field(altered: bytearray, rng: random.Random) -> None:
    """Set a field of the frame's header, or a byte after it, to a revealing value."""
    if len(altered) < _FIXED_BYTES:
        return
    if rng.random() < 0.3:
        at, width = rng.randrange(len(altered)), 1
    else:
        at, width = rng.choice(_FIELDS)
    old = int.from_bytes(altered[at : at + width], "little")
    most = (1 << 8 * width) - 1
    new = rng.choice((0, 1, 2, old - 1, old + 1, old * 2, old ^ 1, 255, 256, most, most // 2, 1000))
    altered[at : at + width] = (new & most).to_bytes(width, "little")


def _checksum(piece: bytes | bytearray) -> bytes:
    return hashlib.sha256(piece).digest()[:_CHECKSUM_BYTES]
