"""Traces survive the codec in every form, and nothing else comes out of it."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_replay.errors import CodecError, TokenMismatchError
from moe_replay.routing import (
    Encoding,
    Origin,
    RoutingTrace,
    decode_trace,
    decode_traces,
    encode_trace,
    encode_traces,
    from_text,
    to_text,
)
from moe_replay.routing.digest import digest_tokens, recover_tokens
from moe_replay.routing.slots import chunk_rows
from moe_replay.testing.synthetic_routes import synthetic_trace

from .any_trace import NAMES, facts, sets, traces

TOKENS = np.arange(50, 90)


@given(traces(), st.sampled_from(Encoding))
def test_codec_keeps_everything_but_routes_exactly(make, encoding):
    trace = make()
    assert facts(decode_trace(encode_trace(trace, encoding=encoding))) == facts(trace)


@given(traces())
def test_compact_keeps_every_set(make):
    trace = make()
    assert sets(decode_trace(encode_trace(trace))) == sets(trace)


@given(traces())
def test_compact_returns_ids_in_increasing_order(make):
    trace = make()
    back = decode_trace(encode_trace(trace))
    assert (np.diff(back.expert_ids[back.valid].astype(int), axis=2) > 0).all()


@given(traces(), st.sampled_from([Encoding.RAW, Encoding.ORDERED]))
def test_raw_and_ordered_keep_the_order_within_sets(make, encoding):
    trace = make()
    back = decode_trace(encode_trace(trace, encoding=encoding))
    assert back.expert_ids[back.valid].tolist() == trace.expert_ids[trace.valid].tolist()


@given(traces(), st.sampled_from(Encoding))
def test_what_an_invalid_row_holds_does_not_travel(make, encoding):
    trace = make()
    back = decode_trace(encode_trace(trace, encoding=encoding))
    assert not back.expert_ids[~back.valid].any()


@given(traces(), st.sampled_from(Encoding))
def test_a_decoded_trace_encodes_to_the_same_bytes(make, encoding):
    trace = make()
    payload = encode_trace(trace, encoding=encoding)
    assert encode_trace(decode_trace(payload), encoding=encoding) == payload


@settings(max_examples=25)
@given(st.lists(st.tuples(NAMES.filter(bool), traces()), max_size=4, unique_by=lambda t: t[0]))
def test_several_traces_keep_names_and_order(drawn):
    named = {name: make() for name, make in drawn}
    back = decode_traces(encode_traces(named))
    assert [(name, facts(trace)) for name, trace in back.items()] == [
        (name, facts(trace)) for name, trace in named.items()
    ]


@pytest.mark.parametrize("invalid", [(), (0, 1, 1500, 2047)])
@pytest.mark.parametrize("encoding", Encoding)
def test_codec_keeps_routes_across_chunks(invalid, encoding):
    """Each row's id in each layer names row and layer, so a row that moved cannot hide."""
    num_rows, num_layers = 2048, 600
    rows, layers = np.arange(num_rows)[:, None], np.arange(num_layers)
    ids = np.stack([(rows * 7 + layers) % 4096, (rows * 7 + layers + 1 + layers % 2) % 4096], 2)
    valid = np.ones(num_rows, dtype=bool)
    valid[list(invalid)] = False
    trace = RoutingTrace.record(
        ids,
        token_ids=np.arange(num_rows),
        valid=valid,
        layers=range(num_layers),
        num_experts=4096,
        origin=Origin.single(engine="e", engine_version="1", policy_version=0, num_rows=num_rows),
    )
    assert chunk_rows(num_layers, 2) < num_rows // 2
    back = decode_trace(encode_trace(trace, encoding=encoding))
    expected = np.sort(ids, axis=2) if encoding is Encoding.COMPACT else ids
    assert np.array_equal(back.expert_ids[valid], expected[valid])


def test_rows_wider_than_4096_bytes_are_carried_as_zeros():
    trace = synthetic_trace(TOKENS[:6], seed=0, num_layers=300, num_experts=64, topk=14)
    back = decode_trace(encode_trace(trace))
    assert (sets(back), back.expert_ids[-1].any()) == (sets(trace), False)


def test_a_decoded_trace_verifies_its_tokens():
    back = decode_trace(encode_trace(synthetic_trace(TOKENS, seed=1)))
    back.check_tokens(TOKENS, where="sample 0")
    changed = TOKENS.copy()
    changed[7] += 1
    with pytest.raises(TokenMismatchError, match="from row 7 of 40"):
        back.check_tokens(changed, where="sample 0")


def test_a_trace_cut_out_of_a_sequence_verifies_after_transport():
    back = decode_trace(encode_trace(synthetic_trace(TOKENS, seed=1).crop(10, 25)))
    back.check_tokens(TOKENS[10:25], where="sample 0")
    with pytest.raises(TokenMismatchError, match="from row 0 of 15"):
        back.check_tokens(TOKENS[11:26], where="sample 0")


def test_a_prompt_and_its_completions_travel_in_one_payload():
    whole = synthetic_trace(TOKENS, seed=2)
    cuts = {"prompt": (0, 30), "completion 0": (30, 40)}
    parts = decode_traces(encode_traces({name: whole.crop(*cut) for name, cut in cuts.items()}))
    for name, (start, stop) in cuts.items():
        parts[name].check_tokens(TOKENS[start:stop], where=name)
        assert sets(parts[name]) == sets(whole.crop(start, stop))


@given(st.lists(st.integers(0, 2**63 - 1)))
def test_recover_tokens_undoes_the_digest(token_ids):
    assert recover_tokens(digest_tokens(np.array(token_ids, dtype=np.int64))).tolist() == token_ids


def test_recover_tokens_gives_negative_ids_modulo_two_to_the_64():
    assert recover_tokens(digest_tokens(np.array([-1]))).tolist() == [2**64 - 1]


def test_raw_routes_are_a_view_of_the_payload():
    payload = encode_trace(synthetic_trace(TOKENS, seed=3), encoding=Encoding.RAW)
    routes = decode_trace(payload).expert_ids
    assert np.shares_memory(routes, np.frombuffer(payload, dtype=np.uint8))
    assert not routes.flags.writeable


def test_raw_routes_of_two_bytes_are_aligned():
    trace = synthetic_trace(TOKENS[:5], seed=3, num_experts=300)
    assert decode_trace(encode_trace(trace, encoding=Encoding.RAW)).expert_ids.flags.aligned


def test_text_form_survives_json():
    payload = encode_trace(synthetic_trace(TOKENS, seed=4))
    assert from_text(json.loads(json.dumps({"trace": to_text(payload)}))["trace"]) == payload


@pytest.mark.parametrize("length", range(12))
def test_text_form_keeps_payloads_of_every_length(length):
    assert from_text(to_text(bytes(range(length)))) == bytes(range(length))


def test_text_form_refuses_every_changed_character():
    text = to_text(b"moe-replay")  # ten bytes: two padding characters, four unused bits
    for at in range(len(text)):
        for character in "AB-= \n":
            changed = text[:at] + character + text[at + 1 :]
            if changed != text:
                try:
                    assert from_text(changed) != b"moe-replay"
                except CodecError:
                    continue


@pytest.mark.parametrize("text", ["QQ", "Q===", "QQ==QQ==", "Q Q==", "QQ==\n", "QR==", "é"])
def test_text_form_refuses_what_to_text_does_not_write(text):
    with pytest.raises(CodecError, match="base64"):
        from_text(text)


def test_decode_trace_refuses_a_payload_of_several():
    trace = synthetic_trace(TOKENS, seed=5)
    with pytest.raises(CodecError, match=r"holds 2 traces \['a', 'b'\], expected one"):
        decode_trace(encode_traces({"a": trace, "b": trace}))


def test_an_empty_payload_holds_no_traces():
    assert decode_traces(encode_traces({})) == {}


@pytest.mark.parametrize("name", ["", "x" * 65_536, "\ud800"])
def test_encode_refuses_names_that_do_not_fit(name):
    with pytest.raises(CodecError, match="trace name"):
        encode_traces({name: synthetic_trace(TOKENS, seed=5)})


def test_encode_refuses_a_policy_version_that_does_not_fit():
    trace = synthetic_trace(TOKENS, seed=5, policy_version=2**63)
    with pytest.raises(CodecError, match="policy versions below"):
        encode_trace(trace)


def test_max_bytes_limits_all_traces_together():
    trace = synthetic_trace(TOKENS, seed=6)
    size = 40 * (3 * 4 + 9)  # three layers of top-4 in uint8, digest and flag
    payload = encode_traces({"a": trace, "b": trace})
    assert len(decode_traces(payload, max_bytes=2 * size)) == 2
    with pytest.raises(CodecError, match=f"trace 'b'.*take {size} bytes, max_bytes is {size - 1}"):
        decode_traces(payload, max_bytes=2 * size - 1)
