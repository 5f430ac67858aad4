"""docs/trace-format.md is true: its example is the codec's, and a second reader agrees."""

import hashlib
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given

from moe_replay.routing import (
    Encoding,
    Origin,
    PolicySpan,
    RoutingTrace,
    decode_traces,
    encode_trace,
    encode_traces,
)

from ...support.payload_mutations import frames, payload_of
from .any_trace import traces

PAGE = Path(__file__).parents[3] / "docs" / "trace-format.md"


def example(name: str) -> bytes:
    """Return the bytes of an example of the page: up to 16 a line, then a remark."""
    block = re.search(rf"```hex {name}\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert block is not None
    return bytes.fromhex("".join(line.split("  ")[0] for line in block[1].splitlines()))


@pytest.fixture
def trace() -> RoutingTrace:
    """The trace that the page describes."""
    return RoutingTrace.record(
        np.array([[[5, 0], [2, 3]], [[4, 7], [6, 1]], [[0, 0], [0, 0]]]),
        token_ids=np.array([11, 300, 13]),
        valid=np.array([True, True, False]),
        layers=(1, 3),
        num_experts=8,
        origin=Origin(
            engine="vllm",
            engine_version="0.21",
            spans=(
                PolicySpan(start=0, stop=1, policy_version=6),
                PolicySpan(start=1, stop=3, policy_version=7),
            ),
        ),
    )


@pytest.mark.parametrize("name", ["raw", "compact"])
def test_the_example_is_what_the_codec_writes(trace, name):
    assert encode_traces({"a": trace}, encoding=Encoding(name)) == example(name)


def test_the_example_decodes_to_the_routes_that_it_names(trace):
    back = decode_traces(example("raw"))["a"]
    assert back.expert_ids[:2].tolist() == [[[5, 0], [2, 3]], [[4, 7], [6, 1]]]
    assert back.token_digest.tolist() == trace.token_digest.tolist()


def read_compact(frame: bytes) -> dict:
    """Read tokens, flags and sets of a compact frame as the page says, in plain Python."""
    w = frame[6]
    rows, _, layers, k, experts, spans, engine, version = struct.unpack_from("<6I2H", frame, 8)
    at = 40 + 4 * layers + 12 * spans + engine + version
    valid = [frame[at + r // 8] >> r % 8 & 1 for r in range(rows)]
    at += -(-rows // 8)
    tokens = [int.from_bytes(frame[at + w * r :][:w], "little") for r in range(rows)]
    at += w * rows
    at += -at % 16
    wide = layers * k * (1 if experts <= 256 else 2) > 4096
    per_chunk = max(1, 524_288 // (layers * k))
    found: dict[int, list] = {}
    for start in range(0, rows, per_chunk):
        chunk = range(start, min(start + per_chunk, rows))
        carried = [r for r in chunk if valid[r] or wide]
        if not carried:
            continue
        values, at = read_values(frame, at, k * layers * len(carried), experts)
        sets = len(carried) * layers
        for number, row in enumerate(carried):
            for layer in range(layers):
                slots = values[number * layers + layer :: sets]
                if all(valid[r] or r not in carried for r in chunk):
                    slots = [sum(slots[: j + 1]) + j for j in range(k)]
                if valid[row]:
                    found.setdefault(row, []).append(sorted(slots))
    return {"tokens": tokens, "valid": valid, "sets": found}


def read_values(frame: bytes, at: int, count: int, experts: int) -> tuple[list[int], int]:
    method, size = struct.unpack_from("<BI", frame, at)
    symbols = frame[at + 5 : at + 5 + size]
    symbols = zstandard.ZstdDecompressor().decompress(symbols) if method else symbols
    at += 5 + size
    shift = max(0, (experts - 1).bit_length() - 8)
    values = [symbol << shift for symbol in symbols]
    for bit in range(shift):
        for i in range(count):
            values[i] |= (frame[at + i // 8] >> i % 8 & 1) << bit
        at += -(-count // 8)
    return values, at


@given(traces())
def test_a_reader_made_from_the_page_finds_what_was_written(make):
    trace = make()
    read = read_compact(frames(encode_trace(trace))[0][1])
    routes = np.sort(trace.expert_ids, axis=2)
    assert read["valid"] == trace.valid.tolist()
    assert read["sets"] == {int(r): routes[r].tolist() for r in np.flatnonzero(trace.valid)}
    trace.check_tokens(np.array(read["tokens"], dtype=np.int64), where="the page's reader")


def test_a_checksum_is_the_start_of_a_sha256():
    raw = example("raw")
    frame = raw[16 : 16 + 128]
    assert frame[-16:] == hashlib.sha256(frame[:-16]).digest()[:16]
    assert raw[-16:] == hashlib.sha256(raw[:16] + raw[144:-16]).digest()[:16]


@pytest.mark.parametrize("name", ["raw", "compact"])
def test_frames_and_payload_of_agree_with_the_page(name):
    assert payload_of(frames(example(name))) == example(name)
