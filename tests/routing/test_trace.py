"""A trace is either possible or an error: form, ids, binding to tokens, and cutting."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_replay.errors import TokenMismatchError, TraceError
from moe_replay.routing import Origin, PolicySpan, RoutingTrace, expert_dtype
from moe_replay.testing.synthetic_routes import synthetic_trace

TOKENS = np.array([11, 12, 13])
IDS = np.array([[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[0, 2], [1, 3]]])


def origin(rows: int, version: int = 0) -> Origin:
    return Origin.single(
        engine="embedded", engine_version="1.0", policy_version=version, num_rows=rows
    )


def record(ids=IDS, *, tokens=TOKENS, valid=None, layers=(1, 3), num_experts=8) -> RoutingTrace:
    return RoutingTrace.record(
        ids,
        token_ids=tokens,
        valid=np.ones(len(tokens), dtype=bool) if valid is None else np.array(valid),
        layers=layers,
        num_experts=num_experts,
        origin=origin(len(tokens)),
    )


def changed(row: int, layer: int, slot: int, value: int) -> np.ndarray:
    ids = IDS.copy()
    ids[row, layer, slot] = value
    return ids


@pytest.mark.parametrize(
    ("experts", "dtype"), [(2, "uint8"), (256, "uint8"), (257, "uint16"), (65_536, "uint16")]
)
def test_expert_dtype_follows_the_expert_count(experts, dtype):
    assert expert_dtype(experts) == np.dtype(dtype)


@pytest.mark.parametrize("experts", [0, 1, 65_537])
def test_expert_dtype_refuses_counts_without_a_choice_or_a_type(experts):
    with pytest.raises(TraceError, match=f"num_experts is {experts}"):
        expert_dtype(experts)


def test_record_keeps_routes_and_layers():
    trace = record()
    assert trace.expert_ids.tolist() == IDS.tolist()
    assert (trace.layers, trace.topk, len(trace), trace.num_valid) == ((1, 3), 2, 3, 3)


@pytest.mark.parametrize("value", [-1, 8, 255])
def test_record_refuses_an_id_outside_the_experts(value):
    with pytest.raises(TraceError, match=f"expert id {value} in row 1"):
        record(changed(1, 0, 0, value))


def test_record_names_the_row_counted_with_invalid_ones():
    with pytest.raises(TraceError, match="expert id 8 in row 2"):
        record(changed(2, 0, 0, 8), valid=[True, False, True])


@pytest.mark.parametrize("value", [-1, 65_535])
def test_record_accepts_anything_in_an_invalid_row(value):
    trace = record(changed(1, 0, 0, value), valid=[True, False, True])
    assert trace.expert_ids[[0, 2]].tolist() == IDS[[0, 2]].tolist()


def test_record_refuses_ids_that_are_no_integers():
    with pytest.raises(TraceError, match="expert_ids is float64, expected integers"):
        record(IDS + 0.5)


def test_record_refuses_fewer_rows_than_tokens():
    with pytest.raises(TraceError, match=r"routes of shape \[2, 2, 2\], 3 tokens and 3 flags"):
        record(IDS[:2])


def test_record_refuses_more_layers_than_are_named():
    with pytest.raises(TraceError, match="expert_ids holds 2 layers, `layers` names 1"):
        record(layers=(1,))


@pytest.mark.parametrize("layers", [(3, 1), (1, 1), (-1, 2)])
def test_record_refuses_layers_that_are_no_increasing_indices(layers):
    with pytest.raises(TraceError, match="layers must be increasing"):
        record(layers=layers)


def test_record_refuses_a_topk_of_all_experts():
    with pytest.raises(TraceError, match="topk is 2 of 2 experts"):
        record(np.array([[[0, 1]]]), tokens=TOKENS[:1], layers=(0,), num_experts=2)


def test_trace_refuses_an_array_of_another_width():
    with pytest.raises(TraceError, match="expert_ids is int64, expected uint8"):
        RoutingTrace(
            expert_ids=IDS,
            valid=np.ones(3, dtype=bool),
            layers=(1, 3),
            num_experts=8,
            token_digest=record().token_digest,
            origin=origin(3),
        )


def test_trace_refuses_policy_spans_that_leave_rows_out():
    with pytest.raises(TraceError, match="must cover the 3 rows"):
        RoutingTrace(
            expert_ids=IDS.astype(np.uint8),
            valid=np.ones(3, dtype=bool),
            layers=(1, 3),
            num_experts=8,
            token_digest=record().token_digest,
            origin=origin(2),
        )


@pytest.mark.parametrize(
    "spans",
    [
        [(0, 3), (1, 1)],
        [(0, 3), (7, 9)],
        [(0, 3), (3, 3)],
        [(0, 2), (1, 3)],
        [(0, 1), (2, 3)],
        [(1, 3)],
        [(-1, 3)],
        [(0, 5), (-1, 3)],
    ],
)
def test_trace_refuses_policy_spans_out_of_order(spans):
    """The first ones cover the rows before the one that is out of place."""
    with pytest.raises(TraceError, match="in order without a gap or overlap"):
        dataclasses.replace(
            record(),
            origin=Origin(
                engine="embedded",
                engine_version="1.0",
                spans=tuple(
                    PolicySpan(start=start, stop=stop, policy_version=0) for start, stop in spans
                ),
            ),
        )


def constant(num_rows: int, tokens: np.ndarray) -> RoutingTrace:
    ids = np.random.default_rng(3).random((num_rows, 2, 8)).argsort(axis=2)[..., :2]
    ids[:, 1] = [5, 6]
    return record(ids, tokens=tokens)


def test_e13_a_layer_that_routes_all_tokens_alike_is_accepted_and_named():
    assert constant(40, np.arange(40)).constant_layers() == (3,)


def test_e13_a_layer_that_differs_in_its_last_row_only_is_not_constant():
    ids = np.tile(IDS[0], (40, 1, 1))
    ids[39] = IDS[1]
    assert record(ids, tokens=np.arange(40)).constant_layers() == ()


@pytest.mark.parametrize("tokens", [np.full(40, 7), np.arange(31)], ids=["repeated", "few"])
def test_e13_control_one_repeated_token_or_few_tokens_make_no_constant_layer(tokens):
    assert constant(len(tokens), tokens).constant_layers() == ()


def test_check_tokens_accepts_the_recorded_tokens():
    record().check_tokens(TOKENS.astype(np.int32), where="sample 4")
    assert record().num_valid == 3


def test_check_tokens_refuses_another_count():
    with pytest.raises(TokenMismatchError, match="sample 4: routes were recorded for 3 tokens"):
        record().check_tokens(TOKENS[:2], where="sample 4")


def test_check_tokens_names_the_first_other_token():
    with pytest.raises(TokenMismatchError, match=r"from row 1 of 3 on \(token id 99 there\)"):
        record().check_tokens(np.array([11, 99, 13]), where="sample 4")


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 4), (2, 1)])
def test_crop_refuses_rows_outside_the_trace(start, stop):
    with pytest.raises(TraceError, match=f"cannot crop rows {start}:{stop}"):
        record().crop(start, stop)


@given(st.integers(1, 30), st.data())
def test_crop_keeps_routes_tokens_and_versions(count, data):
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    tokens = np.arange(100, 100 + count)
    trace = synthetic_trace(tokens, seed=count, policy_version=5)
    part = trace.crop(start, stop)
    part.check_tokens(tokens[start:stop], where="crop")
    assert (part.expert_ids == trace.expert_ids[start:stop]).all()
    assert part.valid.tolist() == trace.valid[start:stop].tolist()
    spans = [(span.start, span.stop, span.policy_version) for span in part.origin.spans]
    assert spans == ([(0, stop - start, 5)] if stop > start else [])


def test_select_layers_finds_layers_by_their_number():
    part = synthetic_trace(TOKENS, seed=1, first_layer=4).select_layers([5, 6])
    whole = synthetic_trace(TOKENS, seed=1, first_layer=4)
    assert part.layers == (5, 6)
    assert (part.expert_ids == whole.expert_ids[:, 1:]).all()


def test_select_layers_refuses_a_layer_that_was_not_recorded():
    with pytest.raises(TraceError, match=r"layers \[0\] are not in the trace"):
        record().select_layers([0, 1])
