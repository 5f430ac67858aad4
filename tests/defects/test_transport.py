"""Defects of transport that the codec makes impossible or loud."""

import base64
import json
import random

import numpy as np
import pytest

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
from moe_replay.testing.synthetic_routes import synthetic_trace

from ..support.payload_mutations import damaged, with_fitting_checksums

SEED = 20_260


def trace_of(ids: np.ndarray, num_experts: int) -> RoutingTrace:
    rows = len(ids)
    return RoutingTrace.record(
        ids,
        token_ids=np.arange(rows) + 100_000,
        valid=np.arange(rows) < rows - 1,
        layers=range(ids.shape[1]),
        num_experts=num_experts,
        origin=Origin.single(engine="vllm", engine_version="1", policy_version=0, num_rows=rows),
    )


def even_routes(rows: int, layers: int, experts: int, topk: int) -> np.ndarray:
    order = np.random.default_rng(SEED).random((rows, layers, experts)).argsort(axis=2)
    return order[..., :topk]


def ordered_sets(trace: RoutingTrace) -> list:
    return np.sort(trace.expert_ids[trace.valid], axis=2).tolist()


@pytest.mark.parametrize("encoding", Encoding)
@pytest.mark.parametrize("num_experts", [257, 384, 512])
def test_c1_ids_above_255_survive_the_codec(num_experts, encoding):
    ids = even_routes(6, 2, num_experts, 8)
    ids[0, 0] = np.arange(num_experts - 8, num_experts)
    back = decode_trace(encode_trace(trace_of(ids, num_experts), encoding=encoding))
    assert ordered_sets(back) == np.sort(ids[:-1], axis=2).tolist()


def test_c1_control_one_byte_loses_most_of_512_experts():
    ids = even_routes(6, 2, 512, 8)
    assert (ids.astype(np.uint8) != ids).mean() > 0.4


@pytest.mark.parametrize("encoding", Encoding)
def test_c2_the_model_decides_the_dtype_and_not_the_largest_id(encoding):
    small = trace_of(even_routes(6, 2, 101, 8), 512)
    assert small.expert_ids.max() <= 100
    back = decode_trace(encode_trace(small, encoding=encoding))
    assert (back.expert_ids.dtype, back.num_experts) == (np.uint16, 512)


def test_c2_control_a_payload_with_another_item_size_is_refused():
    payload = bytearray(encode_trace(trace_of(even_routes(6, 2, 101, 8), 512)))
    payload[16 + 5] = 1  # bytes of an id
    with pytest.raises(CodecError, match=r"1 bytes an id.*expected 2 bytes for 512 experts"):
        decode_trace(with_fitting_checksums(bytes(payload)))


def test_f1_a_token_takes_two_thirds_of_a_byte_an_id_on_the_wire():
    """384 ids a token: 256 bytes as sets, where int32 in base64 takes 2048."""
    trace = trace_of(even_routes(1024, 48, 128, 8), 128)
    ids = trace.expert_ids
    per_token = {
        "compact": len(encode_trace(trace)) / 1024,
        "raw": len(encode_trace(trace, encoding=Encoding.RAW)) / 1024,
        "int32 in base64": len(base64.b64encode(ids.astype(np.int32))) / 1024,
        "JSON lists": len(json.dumps(ids.tolist(), separators=(",", ":"))) / 1024,
    }
    assert 242 < per_token["compact"] < 0.67 * 384
    assert 384 < per_token["raw"] < 388
    assert per_token["int32 in base64"] == 2048
    assert per_token["JSON lists"] > 1300


def test_f1_order_within_sets_costs_extra():
    """log2(8!) is 15.3 bits a set, 92 bytes a token of 48 layers."""
    trace = trace_of(even_routes(1024, 48, 128, 8), 128)
    ordered = len(encode_trace(trace, encoding=Encoding.ORDERED)) / 1024
    assert 75 < ordered - len(encode_trace(trace)) / 1024 < 100


@pytest.fixture(scope="module")
def payloads() -> list[bytes]:
    one = synthetic_trace(np.arange(9) + 70_000, seed=1)
    wide = synthetic_trace(np.arange(5), seed=2, num_experts=300)
    return [
        *(encode_trace(one, encoding=encoding) for encoding in Encoding),
        encode_traces({"prompt": one.crop(0, 4), "completion": one.crop(4, 9), "wide": wide}),
    ]


def test_f7_every_flipped_bit_raises(payloads):
    for payload in payloads:
        for bit in range(8 * len(payload)):
            altered = bytearray(payload)
            altered[bit // 8] ^= 1 << bit % 8
            with pytest.raises(CodecError):
                decode_traces(bytes(altered))


def test_f7_every_truncation_raises(payloads):
    for payload in payloads:
        for length in range(len(payload)):
            with pytest.raises(CodecError):
                decode_traces(payload[:length])


def test_f7_every_extension_raises(payloads):
    for payload in payloads:
        for extra in (b"\0", b"\n", payload[-16:], payload):
            with pytest.raises(CodecError):
                decode_traces(payload + extra)


def test_f7_damage_of_every_kind_raises(payloads):
    rng = random.Random(SEED)
    for _ in range(3000):
        with pytest.raises(CodecError):
            decode_traces(damaged(rng.choice(payloads), rng))


def test_f7_another_version_raises_and_says_so(payloads):
    for version in (0, 2, 256):
        altered = bytearray(payloads[0])
        altered[8:10] = version.to_bytes(2, "little")
        for payload in (bytes(altered), with_fitting_checksums(bytes(altered))):
            with pytest.raises(CodecError, match=f"format version {version}, this reader knows 1"):
                decode_traces(payload)


def test_f7_traces_exchanged_between_two_payloads_raise():
    """Frames of one size, each intact: only the index tells that they are not its own."""
    first, second = (encode_trace(synthetic_trace(np.arange(9), seed=seed)) for seed in (1, 2))
    assert len(first) == len(second)
    index_bytes = 34 + len("trace") + 32  # entry, name, footer
    mixed = second[:-index_bytes] + first[-index_bytes:]
    assert mixed not in (first, second)
    with pytest.raises(CodecError, match="altered or replaced"):
        decode_trace(mixed)


def test_f7_control_intact_payloads_decode(payloads):
    assert [len(decode_traces(payload)) for payload in payloads] == [1, 1, 1, 3]


def test_f7_control_damage_under_a_fitting_checksum_would_go_through(payloads):
    """A flipped route is refused by its checksum: with a fitting one it decodes to others."""
    raw = payloads[0]
    altered = bytearray(raw)
    routes = raw.index(decode_trace(raw).expert_ids.tobytes())
    altered[routes] = next(i for i in range(16) if i not in raw[routes : routes + 4])
    changed = decode_trace(with_fitting_checksums(bytes(altered)))
    assert (changed.expert_ids != decode_trace(raw).expert_ids).sum() == 1
