"""Invented payloads with fitting checksums give a trace or CodecError, in bounded memory."""

import random
import struct
import tracemalloc

import numpy as np
import pytest
import zstandard

from moe_replay.errors import CodecError
from moe_replay.routing import (
    Encoding,
    Origin,
    RoutingTrace,
    decode_trace,
    decode_traces,
    encode_trace,
    encode_traces,
)
from moe_replay.routing.format.set_coding import MAX_EXPANSION
from moe_replay.testing.synthetic_routes import synthetic_trace

from ..support.payload_mutations import (
    frames,
    hostile,
    payload_of,
    with_fitting_checksums,
)

SEED = 20_261
MEGABYTE = 1 << 20


def trace_of(ids: np.ndarray, num_experts: int, valid: np.ndarray | None = None) -> RoutingTrace:
    rows = len(ids)
    return RoutingTrace.record(
        ids,
        token_ids=np.arange(rows) % 7,
        valid=np.ones(rows, dtype=bool) if valid is None else valid,
        layers=range(ids.shape[1]),
        num_experts=num_experts,
        origin=Origin.single(engine="e", engine_version="1", policy_version=0, num_rows=rows),
    )


def forged(trace: RoutingTrace, fields: dict[int, tuple[str, int]], routes: bytes | None) -> bytes:
    """Return a compact payload with header fields (offset: format, value) and routes replaced."""
    body = bytearray(frames(encode_trace(trace))[0][1])
    if routes is not None:
        del body[routes_at(trace, body) :]
        body += routes
    for offset, (form, value) in fields.items():
        struct.pack_into(form, body, offset, value)
    return payload_of([("trace", bytes(body))])


def routes_at(trace: RoutingTrace, body: bytes) -> int:
    names = len(trace.origin.engine) + len(trace.origin.engine_version)
    at = 40 + 4 * len(trace.layers) + 12 * len(trace.origin.spans) + names
    at += -(-len(trace) // 8) + len(trace) * body[6]
    return at + -at % 16


def zstd_chunk(symbols: bytes) -> bytes:
    packed = zstandard.compress(symbols)
    return struct.pack("<BI", 1, len(packed)) + packed


@pytest.fixture(scope="module")
def payloads() -> list[bytes]:
    one = synthetic_trace(np.arange(9) + 70_000, seed=1)
    wide = synthetic_trace(np.arange(5), seed=2, num_experts=300)
    return [
        *(encode_trace(one, encoding=encoding) for encoding in Encoding),
        encode_traces({"prompt": one.crop(0, 4), "completion": one.crop(4, 9), "wide": wide}),
    ]


def test_hostile_payloads_decode_to_possible_traces_or_raise(payloads):
    """A trace that comes back was checked when it was made; any other exception fails the test."""
    rng = random.Random(SEED)
    decoded = 0
    for number in range(2000):
        payload = hostile(rng.choice(payloads), rng)
        try:
            back = decode_traces(payload)
        except CodecError:
            continue
        decoded += 1
        assert all(isinstance(trace, RoutingTrace) for trace in back.values()), number
    assert 100 < decoded < 1000


def test_hostile_payloads_take_little_memory(payloads):
    rng = random.Random(SEED + 1)
    tracemalloc.start()
    for _ in range(1000):
        try:
            decode_traces(hostile(rng.choice(payloads), rng))
        except CodecError:
            continue
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MEGABYTE


def test_a_compression_bomb_is_refused_before_it_is_decompressed():
    trace = synthetic_trace(np.arange(64), seed=3, num_layers=64, num_experts=256, topk=64)
    bomb = zstd_chunk(bytes(63 * 64 * 64))
    payload = forged(trace, {}, bomb)
    tracemalloc.start()
    with pytest.raises(CodecError, match=r"cannot hold 258048 expert slots"):
        decode_trace(payload)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(bomb) < 200 and peak < 63 * 64 * 64


def test_a_zstd_frame_that_states_another_size_is_refused():
    trace = synthetic_trace(np.arange(30), seed=3)
    bomb = zstandard.compress(bytes(100 * MEGABYTE))  # ten kilobytes; 348 slots are wanted
    chunk = struct.pack("<BI", 1, 300) + bomb[:300]
    with pytest.raises(CodecError, match="frame of 104857600 bytes, expected 348 expert slots"):
        decode_trace(forged(trace, {}, chunk))


def test_bytes_behind_a_zstd_frame_are_refused():
    trace = synthetic_trace(np.arange(30), seed=3)
    packed = zstandard.compress(bytes(348)) + b"behind it"
    chunk = struct.pack("<BI", 1, len(packed)) + packed
    with pytest.raises(CodecError, match=r"not a zstd frame of expert slots.*unused data"):
        decode_trace(forged(trace, {}, chunk))


def test_a_chunk_that_is_cut_off_is_refused():
    trace = synthetic_trace(np.arange(30), seed=3)
    chunk = struct.pack("<BI", 0, 348) + bytes(320)
    with pytest.raises(CodecError, match="a chunk of 353 bytes"):
        decode_trace(forged(trace, {}, chunk))


@pytest.mark.parametrize(
    ("offset", "form", "value", "message"),
    [
        (8, "<I", 2**32 - 1, "max_bytes is"),
        (8, "<I", 2**20, "rows need"),
        (12, "<I", 28, "valid flags are set"),
        (12, "<I", 31, "31 of 30 rows valid"),
        (16, "<I", 2**32 - 1, "a header of 17179"),
        (20, "<I", 2**32 - 1, "max_bytes is"),
        (20, "<I", 100_000, "cannot hold"),
        (20, "<I", 0, "top-0"),
        (24, "<I", 2**32 - 1, "num_experts is 4294967295"),
        (24, "<I", 3, "add up to an expert above 2"),
        (28, "<I", 2**32 - 1, "a header of 51539"),
        (6, "<B", 200, "1 to 8 bytes a token"),
        (4, "<B", 3, "an encoding below 3"),
    ],
)
def test_a_forged_header_field_is_refused(offset, form, value, message):
    trace = synthetic_trace(np.arange(30), seed=3)
    with pytest.raises(CodecError, match=message):
        decode_trace(forged(trace, {offset: (form, value)}, None))


@pytest.mark.parametrize("num_experts", [16, 256, 300, 65_536])
def test_gaps_that_leave_the_experts_are_refused(num_experts):
    """The largest symbols wrap around in one and two bytes, and must not give small ids."""
    trace = synthetic_trace(np.arange(30), seed=3, num_experts=num_experts)
    shift = max(0, (num_experts - 1).bit_length() - 8)
    chunk = struct.pack("<BI", 0, 348) + b"\xff" * (348 + shift * -(-348 // 8) * (shift > 0))
    with pytest.raises(CodecError, match=r"add up to an expert above|bits are set after"):
        decode_trace(forged(trace, {}, chunk))


def test_ordered_ids_outside_the_model_are_refused():
    trace = synthetic_trace(np.arange(30), seed=3)
    chunk = struct.pack("<BI", 0, 348) + bytes(range(16, 20)) * 87
    with pytest.raises(CodecError, match="impossible trace: expert id"):
        decode_trace(forged(trace, {4: ("<B", 2)}, chunk))


def test_set_bits_behind_the_last_value_are_refused():
    trace = trace_of(np.array([[[1, 290, 5]]]), 300)
    body = bytearray(frames(encode_trace(trace))[0][1])
    at = routes_at(trace, body)
    assert body[at : at + 5] == b"\0\3\0\0\0"
    body[at + 5 + 3] |= 0b1000  # three values have low bits, this is a fourth
    with pytest.raises(CodecError, match="bits are set after the last of 3 values"):
        decode_trace(payload_of([("trace", bytes(body))]))


def test_routes_that_shrink_too_well_are_stored_as_they_are():
    """Two routes in turn: zstd makes a few bytes of 40,000, which a reader refuses as a bomb."""
    ids = np.tile(np.array([[[1, 2, 3, 4]] * 10, [[5, 6, 7, 8]] * 10]), (500, 1, 1))
    payload = encode_trace(trace_of(ids, 16))
    assert len(payload) > ids.size
    assert np.array_equal(decode_trace(payload).expert_ids, ids)
    symbols = (b"\1" * 10 + b"\5" * 10) * 500 + bytes(30_000)  # smallest ids, then gaps of nothing
    num_packed = len(zstandard.compress(symbols, level=1))
    assert num_packed * MAX_EXPANSION < len(symbols)


def test_rows_without_routes_cost_a_few_bytes():
    ids = np.zeros((1000, 48, 8), dtype=np.int64)
    ids[0] = np.arange(8)
    valid = np.arange(1000) == 0
    assert len(encode_trace(trace_of(ids, 128, valid))) < 2500


def test_a_prompt_left_out_comes_back_without_routes():
    trace = synthetic_trace(np.arange(40), seed=3, valid=np.arange(40) >= 30)
    back = decode_trace(encode_trace(trace))
    assert back.valid.tolist() == trace.valid.tolist()
    assert np.array_equal(back.expert_ids[30:], np.sort(trace.expert_ids[30:], axis=2))


def test_rows_too_wide_to_be_left_out_cost_their_bytes():
    """Otherwise a byte of a token id could stand for any number of zeros."""
    ids = np.zeros((40, 300, 14), dtype=np.int64)
    assert len(encode_trace(trace_of(ids, 64, np.zeros(40, dtype=bool)))) > ids.size


@pytest.mark.parametrize("encoding", Encoding)
@pytest.mark.parametrize("last", [-1, "before the routes"])
def test_padding_that_is_not_zero_is_refused(encoding, last):
    trace = trace_of(np.array([[[1, 5]]] * 3), 8)
    body = bytearray(frames(encode_trace(trace, encoding=encoding))[0][1])
    body[last if isinstance(last, int) else routes_at(trace, body) - 1] ^= 64
    with pytest.raises(CodecError, match="the padding holds"):
        decode_trace(payload_of([("trace", bytes(body))]))


def with_index(payload: bytes, entries: list[tuple[int, int, str]], between: bytes = b"") -> bytes:
    """Return a payload of the frames of ``payload`` under an index of (first byte, bytes, name)."""
    index_at = int.from_bytes(payload[-32:-24], "little")
    stored = payload[:index_at] + between
    index = b"".join(
        struct.pack("<QQ16sH", start, size, stored[start + size - 16 : start + size], len(name))
        + name.encode()
        for start, size, name in entries
    )
    footer = struct.pack("<QI4s", len(stored), len(entries), b"TEND")
    return with_fitting_checksums(stored + index + footer + bytes(16))


@pytest.fixture
def pair() -> tuple[bytes, int]:
    """A payload of two frames of equal size, and that size."""
    trace = synthetic_trace(np.arange(9), seed=1)
    return encode_traces({"a": trace, "b": trace}), len(frames(encode_trace(trace))[0][1]) + 16


def test_control_an_index_made_by_hand_is_accepted(pair):
    payload, size = pair
    assert with_index(payload, [(16, size, "a"), (16 + size, size, "b")]) == payload


def test_an_index_that_uses_a_frame_twice_is_refused(pair):
    """A thousand entries for one frame would decode to a thousand traces."""
    payload, size = pair
    with pytest.raises(CodecError, match=f"entry 1 places a trace at bytes 16:{16 + size}"):
        decode_traces(with_index(payload, [(16, size, "a"), (16, size, "b")]))


@pytest.mark.parametrize(
    "entries", [[], [(16, "size", "a")]], ids=["no frame is named", "one frame is not named"]
)
def test_frames_outside_the_index_are_refused(pair, entries):
    payload, size = pair
    with pytest.raises(CodecError, match="bytes before it belong to no trace"):
        decode_traces(with_index(payload, [(at, size, name) for at, _, name in entries]))


def test_bytes_between_frames_and_index_are_refused(pair):
    payload, size = pair
    entries = [(16, size, "a"), (16 + size, size, "b")]
    with pytest.raises(CodecError, match="0 bytes of the index and 16 bytes before it"):
        decode_traces(with_index(payload, entries, between=bytes(16)))


def test_a_name_used_twice_is_refused(pair):
    payload, size = pair
    with pytest.raises(CodecError, match=r"the name 'a' is .* not the only one of its kind"):
        decode_traces(with_index(payload, [(16, size, "a"), (16 + size, size, "a")]))


@pytest.mark.parametrize("at", [0, 7])
def test_another_magic_is_refused(pair, at):
    altered = bytearray(pair[0])
    altered[at] ^= 1
    with pytest.raises(CodecError, match="these bytes are not traces"):
        decode_traces(with_fitting_checksums(bytes(altered)))


@pytest.mark.parametrize("at", [10, 12, 15])
def test_reserved_bytes_that_are_not_zero_are_refused(pair, at):
    altered = bytearray(pair[0])
    altered[at] = 1
    with pytest.raises(CodecError, match="reserved bytes hold"):
        decode_traces(with_fitting_checksums(bytes(altered)))
