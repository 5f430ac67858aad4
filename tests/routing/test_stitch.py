"""Rollouts of several calls: each row is from the call that fed its token first."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_replay.errors import TokenMismatchError, TraceError
from moe_replay.routing import (
    EngineCall,
    Origin,
    PolicySpan,
    RoutedModel,
    RoutingTrace,
    RowKind,
    StitchedRollout,
    merge_partial,
    stitch_turns,
    unrouted_trace,
)

MODEL = RoutedModel(moe_layers=(1, 3), num_decoder_layers=4, num_experts=200, topk=2)


def spelled(call: int, stop: int) -> np.ndarray:
    """Return routes that name the call (first layer) and the token's place (second layer)."""
    places = np.arange(stop)
    one = np.stack([np.full(stop, 2 * call), np.full(stop, 2 * call + 1)], axis=1)
    two = np.stack([2 * places, 2 * places + 1], axis=1)
    return np.stack([one, two], axis=1)


def call(
    number: int, fed, sampled, *, start: int = 0, invalid=(), routes: bool = True
) -> EngineCall:
    tokens = np.array([*fed, *sampled])
    origin = Origin.single(
        engine="vllm", engine_version="1", policy_version=number, num_rows=len(tokens) - start
    )
    if routes:
        valid = np.arange(len(tokens)) < len(tokens) - 1
        valid[list(invalid)] = False
        trace = RoutingTrace.record(
            spelled(number, len(tokens))[start:],
            token_ids=tokens[start:],
            valid=valid[start:],
            layers=MODEL.moe_layers,
            num_experts=MODEL.num_experts,
            origin=origin,
        )
    else:
        trace = unrouted_trace(tokens[start:], model=MODEL, origin=origin)
    return EngineCall(fed_ids=np.array(fed), sampled_ids=np.array(sampled, dtype=int), trace=trace)


def owners(made: StitchedRollout) -> list[int | None]:
    """Return the call that each row came from, after checking that it is on its token."""
    trace = made.trace
    trace.check_tokens(made.token_ids, where="stitched")
    assert (trace.expert_ids[trace.valid, 1, 0] == 2 * np.flatnonzero(trace.valid)).all()
    first = trace.expert_ids[:, 0, 0] // 2
    return [int(n) if held else None for n, held in zip(first, trace.valid, strict=True)]


def spans(made: StitchedRollout) -> list[tuple[int, int, int]]:
    return [(s.start, s.stop, s.policy_version) for s in made.trace.origin.spans]


ABC, DE, FG, HI = [1, 2, 3], [4, 5], [6, 7], [8, 9]


@pytest.mark.parametrize("start", [0, 2, 4])
def test_resumed_rows_come_from_the_call_that_fed_them_first(start):
    """The second call returns everything so far, a part of it, or its own rows and one more."""
    made = merge_partial([call(0, ABC, DE), call(1, ABC + DE, FG, start=start)], where="s")
    assert made.token_ids.tolist() == ABC + DE + FG
    assert owners(made) == [0, 0, 0, 0, 1, 1, None]
    assert spans(made) == [(0, 4, 0), (4, 7, 1)]
    assert made.num_superseded == 4 - start


def test_resumed_rows_without_the_boundary_row_leave_it_invalid():
    made = merge_partial([call(0, ABC, DE), call(1, ABC + DE, FG, start=5)], where="s")
    assert owners(made) == [0, 0, 0, 0, None, 1, None]
    assert spans(made) == [(0, 4, 0), (4, 7, 1)]
    assert made.num_routed[RowKind.SAMPLED] == 2


def test_a_call_without_routes_leaves_its_rows_invalid_and_later_rows_on_their_tokens():
    calls = [
        call(0, ABC, DE),
        call(1, ABC + DE, FG, routes=False),
        call(2, ABC + DE + FG, HI),
    ]
    made = merge_partial(calls, where="s")
    assert owners(made) == [0, 0, 0, 0, None, None, 2, 2, None]
    assert spans(made) == [(0, 4, 0), (4, 6, 1), (6, 9, 2)]
    assert made.num_rows == {RowKind.PROMPT: 3, RowKind.SAMPLED: 6, RowKind.ENVIRONMENT: 0}
    assert made.num_routed == {RowKind.PROMPT: 3, RowKind.SAMPLED: 3, RowKind.ENVIRONMENT: 0}


def test_a_first_call_without_routes_is_not_filled_from_a_later_prefill():
    calls = [call(0, ABC, DE, routes=False), call(1, ABC + DE, FG)]
    made = merge_partial(calls, where="s")
    assert owners(made) == [None] * 4 + [1, 1, None]
    assert made.num_superseded == 4


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_call_aborted_before_it_sampled_anything_changes_nothing(number):
    calls = [call(0, ABC, DE), call(1, ABC + DE, FG)]
    empty = [call(7, ABC, []), call(7, ABC + DE, []), call(7, ABC + DE + FG, [])]
    made = merge_partial([*calls[:number], empty[number], *calls[number:]], where="s")
    assert owners(made) == [0, 0, 0, 0, 1, 1, None]


def test_one_call_is_returned_as_it_is():
    made = merge_partial([call(0, ABC, DE)], where="s")
    assert owners(made) == [0, 0, 0, 0, None]
    assert made.prompt_length == 3
    assert made.is_sampled.tolist() == [False] * 3 + [True] * 2


def test_a_call_that_crossed_a_push_keeps_its_spans():
    first, second = call(0, ABC, DE), call(1, ABC + DE, FG)
    crossing = RoutingTrace(
        expert_ids=second.trace.expert_ids,
        valid=second.trace.valid,
        layers=MODEL.moe_layers,
        num_experts=MODEL.num_experts,
        token_digest=second.trace.token_digest,
        origin=Origin(
            engine="vllm",
            engine_version="1",
            spans=(
                PolicySpan(start=0, stop=5, policy_version=0),
                PolicySpan(start=5, stop=7, policy_version=4),
            ),
        ),
    )
    second = EngineCall(fed_ids=second.fed_ids, sampled_ids=second.sampled_ids, trace=crossing)
    assert spans(merge_partial([first, second], where="s")) == [(0, 5, 0), (5, 7, 4)]


def test_a_resumed_call_that_was_fed_something_new_is_refused():
    with pytest.raises(TokenMismatchError, match=r"s: call 1 was fed 6 tokens, expected the 5"):
        merge_partial([call(0, ABC, DE), call(1, ABC + DE + [6], [7])], where="s")


def test_turns_take_environment_rows_from_the_call_that_was_given_them():
    made = stitch_turns([call(0, ABC, DE), call(1, ABC + DE + FG, HI)], where="s")
    assert owners(made) == [0, 0, 0, 0, 1, 1, 1, 1, None]
    assert made.is_sampled.tolist() == [False] * 3 + [True] * 2 + [False] * 2 + [True] * 2
    assert made.num_rows == {RowKind.PROMPT: 3, RowKind.ENVIRONMENT: 2, RowKind.SAMPLED: 4}
    assert made.num_routed == {RowKind.PROMPT: 3, RowKind.ENVIRONMENT: 2, RowKind.SAMPLED: 3}
    assert made.num_superseded == 4


def test_turns_with_incremental_rows_leave_unreturned_environment_rows_invalid():
    made = stitch_turns([call(0, ABC, DE), call(1, ABC + DE + FG, HI, start=7)], where="s")
    assert owners(made) == [0, 0, 0, 0, None, None, None, 1, None]
    assert made.num_routed[RowKind.ENVIRONMENT] == 0
    live = {str(reason): n for reason, n in made.coverage.num_live.items() if n}
    assert live == {"engine_gave_none": 1, "environment_omitted": 2, "last_token": 1}


def test_rows_that_their_own_call_left_unwritten_stay_invalid():
    calls = [call(0, ABC, DE, invalid=[0, 1]), call(1, ABC + DE + FG, HI)]
    assert owners(stitch_turns(calls, where="s")) == [None, None, 0, 0, 1, 1, 1, 1, None]


def test_a_turn_whose_context_was_rewritten_is_refused():
    with pytest.raises(TokenMismatchError, match="call 1 was fed token 99 in row 1, where 2"):
        stitch_turns([call(0, ABC, DE), call(1, [1, 99, 3, 4, 5, 6], [7])], where="s")


def test_a_turn_whose_context_was_compacted_is_refused():
    with pytest.raises(TokenMismatchError, match=r"call 1 was fed 3 tokens, fewer than the 5"):
        stitch_turns([call(0, ABC, DE), call(1, [1, 2, 6], [7])], where="s")


def test_a_trace_of_another_call_of_the_same_length_is_refused():
    right, other = call(1, ABC + DE + FG, HI), call(1, ABC + DE + [6, 77], HI)
    mixed = EngineCall(fed_ids=right.fed_ids, sampled_ids=right.sampled_ids, trace=other.trace)
    with pytest.raises(TokenMismatchError, match=r"call 1 is bound to other tokens .* row 6 of"):
        stitch_turns([call(0, ABC, DE), mixed], where="s")


def test_an_incremental_trace_that_ends_one_token_early_is_refused():
    right = call(1, ABC + DE, FG)
    short = EngineCall(
        fed_ids=right.fed_ids,
        sampled_ids=right.sampled_ids,
        trace=call(1, ABC + DE, FG[:1], start=3).trace,
    )
    with pytest.raises(TokenMismatchError, match="ends elsewhere than at the last sampled token"):
        merge_partial([call(0, ABC, DE), short], where="s")


@pytest.mark.parametrize("rows", [0, 6])
def test_a_trace_with_no_row_or_more_rows_than_tokens_is_refused(rows):
    longer = call(0, ABC + DE, [6]).trace.crop(0, rows)
    made = EngineCall(fed_ids=np.array(ABC), sampled_ids=np.array(DE), trace=longer)
    with pytest.raises(TokenMismatchError, match=f"has {rows} rows, expected 1 to 5"):
        merge_partial([made], where="s")


def test_a_route_for_the_token_sampled_last_is_refused():
    longer = call(0, ABC + DE, [6]).trace.crop(0, 5)
    made = EngineCall(fed_ids=np.array(ABC), sampled_ids=np.array(DE), trace=longer)
    with pytest.raises(TraceError, match="the last row of the trace of call 0 is valid"):
        merge_partial([made], where="s")


def test_calls_of_different_models_are_refused():
    second = call(1, ABC + DE, FG)
    narrower = EngineCall(
        fed_ids=second.fed_ids,
        sampled_ids=second.sampled_ids,
        trace=second.trace.select_layers([1]),
    )
    with pytest.raises(TraceError, match=r"trace of call 1 has .*one model"):
        merge_partial([call(0, ABC, DE), narrower], where="s")


def test_no_call_is_refused():
    with pytest.raises(TraceError, match="no engine call to stitch"):
        stitch_turns([], where="s")


@given(st.data())
def test_every_row_comes_from_the_first_call_that_fed_its_token(data):
    """Whatever the turns are, the owner of each row is worked out token by token."""
    tokens, calls, first_fed = list(range(10, 13)), [], {}
    count = data.draw(st.integers(1, 4))
    for number in range(count):
        tokens += [20 + number] * data.draw(st.integers(0, 3)) if number else []
        sampled = [50 + number] * data.draw(st.integers(0, 4))
        fed, tokens = list(tokens), tokens + sampled
        start = data.draw(st.integers(0, len(fed) - (not sampled)))
        calls.append(call(number, fed, sampled, start=start))
        for place in range(len(tokens) - 1):
            if sampled or number == count - 1:
                first_fed.setdefault(place, number if place >= start else None)
    made = stitch_turns(calls, where="s")
    assert owners(made) == [*(first_fed[place] for place in range(len(tokens) - 1)), None]


def test_e16_rows_of_a_call_that_sampled_nothing_belong_to_the_call_that_sampled_from_them():
    calls = [call(0, ABC, [], routes=False), call(1, ABC, DE)]
    made = merge_partial(calls, where="s")
    assert owners(made) == [1, 1, 1, 1, None]
    assert spans(made) == [(0, 5, 1)]
    assert made.coverage.fraction == 1.0


def test_e16_routes_of_a_call_that_sampled_nothing_give_way_and_are_counted():
    calls = [call(0, ABC, DE), call(1, ABC + DE + FG, []), call(2, ABC + DE + FG, HI)]
    made = stitch_turns(calls, where="s")
    assert owners(made) == [0, 0, 0, 0, 2, 2, 2, 2, None]
    assert spans(made) == [(0, 4, 0), (4, 9, 2)]
    assert made.num_superseded == 6 + 4


def test_e16_a_last_call_that_sampled_nothing_closes_the_sequence():
    made = stitch_turns([call(0, ABC, DE), call(1, ABC + DE + FG, [])], where="s")
    assert owners(made) == [0, 0, 0, 0, 1, 1, None]
    assert made.is_sampled.tolist() == [False] * 3 + [True] * 2 + [False] * 2
