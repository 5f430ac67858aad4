"""Set coding: one chunk of routes in nearly as few bits as its sets of experts have choices.

A set is sorted and written as the gaps between its members. Equal-sized sets drawn evenly have gaps
that are all distributed alike, close to geometric, so a Huffman code over the gaps comes within 5 %
of the limit ``log2(C(E, k))``: 42.1 bits against 40.4 for top-8 of 128, where plain bytes take 64.
Huffman codes symbols of one byte and costs at least one bit each. Of ids that need more than eight
bits, the low bits, which are as good as random, therefore stay outside it.

Worked example, top-4 of 512 experts, one set as recorded:

    ids             300  12 301   7
    sorted            7  12 300 301
    gaps              7   4 287   0      experts between neighbours: 12 - 7 - 1 = 4
    low bit           1   0   1   0      9 bits an id, of which 1 is left outside
    symbols           3   2 143   0      gap >> 1, one byte each, Huffman coded
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np

from moe_replay.errors import CodecError
from moe_replay.routing.form import expert_dtype
from moe_replay.routing.slots import from_planes, sort_planes, to_planes

if TYPE_CHECKING:
    from jaxtyping import UInt, UInt8
    from zstandard import ZstdCompressor, ZstdDecompressor

MAX_EXPANSION = 32
"""Maximum symbols that a stored byte stands for; what would shrink further is not compressed."""

_CHUNK = struct.Struct("<BI")  # method, bytes of the symbols
_PLAIN, _ZSTD = 0, 1


def new_compressor() -> ZstdCompressor:
    """Return the compressor of every chunk; gaps have no matches: the fastest level is enough."""
    from zstandard import ZstdCompressor

    return ZstdCompressor(level=1)


def new_decompressor() -> ZstdDecompressor:
    """Return the decompressor of every chunk."""
    from zstandard import ZstdDecompressor

    return ZstdDecompressor()


def encode_chunk(
    expert_ids: UInt[np.ndarray, "rows layers topk"],
    num_experts: int,
    compressor: ZstdCompressor,
    *,
    keep_order: bool,
) -> bytes:
    """Return the bytes of one chunk; every row is valid."""
    values = to_planes(expert_ids)
    if not keep_order:
        values = _gaps(values)
    num_low_bits = _num_low_bits(num_experts)
    symbols = values if not num_low_bits else (values >> num_low_bits).astype(np.uint8)
    packed = compressor.compress(symbols.data)
    method = _ZSTD
    if len(packed) >= symbols.size or len(packed) * MAX_EXPANSION < symbols.size:
        packed, method = symbols.tobytes(), _PLAIN
    low_bits = [
        np.packbits((values & (1 << bit)).reshape(-1), bitorder="little").tobytes()
        for bit in range(num_low_bits)
    ]
    return b"".join([_CHUNK.pack(method, len(packed)), packed, *low_bits])


def chunk_size(stored: memoryview, num_slots: int, num_experts: int, where: str) -> int:
    """Return the bytes of the chunk at the start of ``stored``, after proving that they are there.

    Raises:
        CodecError: when the chunk is cut off, or too small to hold ``num_slots`` expert ids.
    """
    if len(stored) < _CHUNK.size:
        raise CodecError(f"{where}: {len(stored)} bytes left, a chunk starts with {_CHUNK.size}")
    method, packed_bytes = _CHUNK.unpack_from(stored)
    plausible = {
        _PLAIN: packed_bytes == num_slots,
        _ZSTD: packed_bytes < num_slots <= packed_bytes * MAX_EXPANSION,
    }
    if not plausible.get(method, False):
        raise CodecError(
            f"{where}: {packed_bytes} bytes by method {method} cannot hold {num_slots} expert slots; expected "
            f"{num_slots} bytes by method {_PLAIN}, or 1 to {MAX_EXPANSION} slots a byte by method {_ZSTD}: the chunk "
            "was not written by this format, or is made to exhaust memory"
        )
    size = _CHUNK.size + packed_bytes + _num_low_bits(num_experts) * -(-num_slots // 8)
    if size > len(stored):
        raise CodecError(f"{where}: a chunk of {size} bytes, {len(stored)} are left")
    return size


def decode_chunk(
    stored: memoryview,
    out: UInt[np.ndarray, "rows layers topk"],
    num_experts: int,
    decompressor: ZstdDecompressor,
    *,
    keep_order: bool,
    where: str,
) -> None:
    """Write the routes of a chunk, whose size `chunk_size` has proven, to ``out``.

    Raises:
        CodecError: when the symbols do not decompress to the slots of ``out``, or a set leaves the
            model's experts.
    """
    sets, topk = out.shape[0] * out.shape[1], out.shape[2]
    method, packed_bytes = _CHUNK.unpack_from(stored)
    packed = stored[_CHUNK.size : _CHUNK.size + packed_bytes]
    symbols = packed if method == _PLAIN else _decompressed(packed, out.size, decompressor, where)
    values = np.frombuffer(symbols, dtype=np.uint8).astype(expert_dtype(num_experts))
    num_low_bits = _num_low_bits(num_experts)
    values <<= num_low_bits
    rest = np.frombuffer(stored[_CHUNK.size + packed_bytes :], dtype=np.uint8)
    for bit in range(num_low_bits):
        plane = rest[bit * -(-out.size // 8) :][: -(-out.size // 8)]
        values |= _bits(plane, out.size, where).astype(values.dtype) << bit
    planes = values.reshape(topk, sets)
    if not keep_order:
        _sum_gaps(planes, num_experts, where)
    from_planes(planes, out)


def _num_low_bits(num_experts: int) -> int:
    return max(0, (num_experts - 1).bit_length() - 8)


def _gaps(planes: UInt[np.ndarray, "topk sets"]) -> UInt[np.ndarray, "topk sets"]:
    """Return the smallest id of each set, then how many experts lie between neighbouring ids."""
    ordered = sort_planes(planes)
    gaps = np.empty_like(planes)
    gaps[0] = ordered[0]
    for slot in range(1, len(planes)):
        np.subtract(ordered[slot], ordered[slot - 1], out=gaps[slot])
        gaps[slot] -= 1
    return gaps


def _sum_gaps(planes: UInt[np.ndarray, "topk sets"], num_experts: int, where: str) -> None:
    for slot in range(1, len(planes)):
        planes[slot] += 1
        planes[slot] += planes[slot - 1]
    # A sum that leaves the dtype wraps to at most its predecessor, because a gap is below 2**bits.
    if (planes[1:] <= planes[:-1]).any() or int(planes[-1].max()) >= num_experts:
        raise CodecError(
            f"{where}: the gaps of a set add up to an expert above {num_experts - 1}; the bytes were not written by this "
            "format, or their expert count was altered"
        )


def _bits(
    plane: UInt8[np.ndarray, " bytes"], count: int, where: str
) -> UInt8[np.ndarray, " count"]:
    bits = np.unpackbits(plane, bitorder="little")
    if bits[count:].any():
        raise CodecError(f"{where}: bits are set after the last of {count} values, expected zeros")
    return bits[:count]


def _decompressed(
    packed: memoryview, num_slots: int, decompressor: ZstdDecompressor, where: str
) -> bytes:
    from zstandard import ZstdError, get_frame_parameters

    try:
        claimed = get_frame_parameters(packed).content_size
        if claimed == num_slots:
            return decompressor.decompress(packed, allow_extra_data=False)
    except ZstdError as error:
        raise CodecError(f"{where}: not a zstd frame of expert slots: {error}") from error
    raise CodecError(f"{where}: a zstd frame of {claimed} bytes, expected {num_slots} expert slots")
