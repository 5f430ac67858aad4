"""Defects by which routes land on other tokens when a rollout takes several calls."""

import numpy as np
import pytest

from moe_replay.errors import TokenMismatchError, TraceError
from moe_replay.routing import (
    EngineCall,
    Origin,
    RoutedModel,
    RoutingTrace,
    merge_partial,
    stitch_turns,
    trace_from_payload,
    trace_from_split_payload,
    unrouted_trace,
)

MODEL = RoutedModel(moe_layers=(0,), num_decoder_layers=1, num_experts=256, topk=2)
# A prompt of two tokens, then two tokens sampled in each of three calls.
TOKENS = [10, 11, 12, 13, 14, 15, 16, 17]


def payload(number: int, num_rows: int, start: int = 0) -> np.ndarray:
    """Return routes that name the call and the token's place in the sequence."""
    places = 100 + np.arange(start, num_rows)
    return np.stack([np.full(len(places), number), places], axis=1)[:, None]


def origin(number: int, num_rows: int) -> Origin:
    return Origin.single(
        engine="vllm", engine_version="1", policy_version=number, num_rows=num_rows
    )


def engine_call(number: int, fed: list[int], sampled: list[int], start: int = 0) -> EngineCall:
    """Return a call whose engine sends the rows from ``start`` on."""
    tokens = np.array(fed + sampled)
    trace = trace_from_payload(
        payload(number, len(tokens) - 1, start),
        token_ids=tokens,
        num_prompt_tokens=len(fed),
        model=MODEL,
        origin=origin(number, len(tokens)),
        where=f"call {number}",
        start=start,
    )
    return EngineCall(fed_ids=np.array(fed), sampled_ids=np.array(sampled), trace=trace)


def segment(number: int, start: int = 0) -> EngineCall:
    return engine_call(
        number, TOKENS[: 2 * number + 2], TOKENS[2 * number + 2 : 2 * number + 4], start
    )


def without_routes(call: EngineCall, number: int) -> EngineCall:
    tokens = np.concatenate([call.fed_ids, call.sampled_ids])
    trace = unrouted_trace(tokens, model=MODEL, origin=origin(number, len(tokens)))
    return EngineCall(fed_ids=call.fed_ids, sampled_ids=call.sampled_ids, trace=trace)


def places(trace: RoutingTrace) -> list[int | None]:
    """Return the token place that each row's route names."""
    named = trace.expert_ids[:, 0, 1].astype(int) - 100
    return [int(place) if held else None for place, held in zip(named, trace.valid, strict=True)]


def callers(trace: RoutingTrace) -> list[int | None]:
    """Return the call that each row's route names."""
    named = trace.expert_ids[:, 0, 0]
    return [int(call) if held else None for call, held in zip(named, trace.valid, strict=True)]


@pytest.mark.parametrize("start", [0, 5])
def test_a5_rows_after_a_segment_without_routes_stay_on_their_tokens(start):
    calls = [segment(0), without_routes(segment(1), 1), segment(2, start=start)]
    made = merge_partial(calls, where="sample 0")
    assert places(made.trace) == [0, 1, 2, None, None, 5, 6, None]
    made.trace.check_tokens(np.array(TOKENS), where="sample 0")


def test_a5_dropping_the_segment_instead_is_refused():
    """The second call is left out, so that the third one's rows would follow the first one's."""
    with pytest.raises(TokenMismatchError, match="call 1 was fed 6 tokens, expected the 4"):
        merge_partial([segment(0), segment(2)], where="sample 0")


def test_a5_control_concatenating_what_there_is_would_shift_the_third_segment():
    kept = np.concatenate([payload(0, 3), payload(2, 7, start=5)])
    assert (kept[:, 0, 1] - 100).tolist() == [0, 1, 2, 5, 6] != [0, 1, 2, 3, 4]


def test_a6_two_calls_that_return_the_whole_sequence_give_one_row_a_token():
    made = merge_partial([segment(0), segment(1)], where="sample 0")
    assert len(made.trace) == len(made.token_ids) == 6
    assert places(made.trace) == [0, 1, 2, 3, 4, None]
    assert callers(made.trace) == [0, 0, 0, 1, 1, None]
    assert [s.policy_version for s in made.trace.origin.spans] == [0, 1]


def test_a6_a_call_that_returns_its_own_rows_gives_the_same_trace():
    whole = merge_partial([segment(0), segment(1)], where="sample 0")
    own = merge_partial([segment(0), segment(1, start=3)], where="sample 0")
    assert own.trace.expert_ids[own.trace.valid].tolist() == (
        whole.trace.expert_ids[whole.trace.valid].tolist()
    )
    assert own.trace.valid.tolist() == whole.trace.valid.tolist()


def test_a6_concatenated_calls_are_not_the_routes_of_the_sequence():
    """Ten rows for six tokens, as two full-sequence arrays give them."""
    traces = [segment(0).trace, segment(1).trace]
    joined = RoutingTrace.record(
        np.concatenate([trace.expert_ids for trace in traces]),
        token_ids=TOKENS[:4] + TOKENS[:6],
        valid=np.concatenate([trace.valid for trace in traces]),
        layers=(0,),
        num_experts=MODEL.num_experts,
        origin=origin(1, 10),
    )
    with pytest.raises(TokenMismatchError, match="recorded for 10 tokens, the sample has 6"):
        joined.check_tokens(np.array(TOKENS[:6]), where="sample 0")


def test_a6_control_the_last_call_alone_would_replace_what_was_sampled():
    assert callers(segment(1).trace) == [1, 1, 1, 1, 1, None]


FIRST, ANSWER, TOOL, SECOND = [10, 11], [12, 13], [14, 15, 16], [17, 18]


@pytest.mark.parametrize("start", [0, 3])
def test_a7_rows_of_the_first_turn_are_those_it_was_sampled_with(start):
    turns = [
        engine_call(0, FIRST, ANSWER),
        engine_call(1, FIRST + ANSWER + TOOL, SECOND, start),
    ]
    made = stitch_turns(turns, where="sample 0")
    assert callers(made.trace) == [0, 0, 0, 1, 1, 1, 1, 1, None]
    assert places(made.trace) == [0, 1, 2, 3, 4, 5, 6, 7, None]
    assert made.is_sampled.tolist() == [False, False, True, True, False, False, False, True, True]


def test_a7_environment_tokens_without_a_route_are_invalid_never_constant():
    turns = [
        engine_call(0, FIRST, ANSWER),
        engine_call(1, FIRST + ANSWER + TOOL, SECOND, start=7),
    ]
    made = stitch_turns(turns, where="sample 0")
    assert made.trace.valid.tolist() == [True] * 3 + [False] * 4 + [True, False]


def test_a7_control_the_last_turn_returns_other_routes_for_the_first():
    last = engine_call(1, FIRST + ANSWER + TOOL, SECOND).trace
    assert callers(last)[:3] == [1, 1, 1]


def split_and_joined() -> tuple[RoutingTrace, RoutingTrace]:
    tokens = np.array(TOKENS)
    rows = payload(0, 7)
    bound = {
        "token_ids": tokens,
        "num_prompt_tokens": 4,
        "model": MODEL,
        "origin": origin(0, len(tokens)),
        "where": "request 0",
    }
    return trace_from_split_payload(rows[:4], rows[4:], **bound), trace_from_payload(rows, **bound)


def test_a8_both_payload_layouts_give_the_same_trace():
    split, joined = split_and_joined()
    assert places(split) == places(joined) == [0, 1, 2, 3, 4, 5, 6, None]
    assert split.token_digest.tolist() == joined.token_digest.tolist()


@pytest.mark.parametrize(
    ("rows", "cause"),
    [(slice(0, 4), "prompt alone"), (slice(4, 7), "completion alone")],
)
def test_a8_one_part_alone_is_not_taken_for_the_whole(rows, cause):
    tokens = np.array(TOKENS)
    with pytest.raises(TraceError, match=cause):
        trace_from_payload(
            payload(0, 7)[rows],
            token_ids=tokens,
            num_prompt_tokens=4,
            model=MODEL,
            origin=origin(0, len(tokens)),
            where="request 0",
        )


def test_a8_control_completion_rows_at_the_prompts_start_name_other_places():
    split, _ = split_and_joined()
    assert places(split)[4:7] != places(split)[:3]
