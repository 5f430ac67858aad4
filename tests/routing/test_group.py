"""A group holds the prompt's rows once and gives back exactly what was joined."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_replay.errors import TokenMismatchError, TraceError
from moe_replay.routing import RoutingTrace, TraceGroup
from moe_replay.testing.synthetic_routes import synthetic_trace

PROMPT = np.array([5, 6, 7, 8])


def sample(number: int, num_sampled: int, *, version: int = 0) -> RoutingTrace:
    """Return the trace of one sample; the routes of the prompt are the same in all."""
    tokens = 100 * (number + 1) + np.arange(num_sampled)
    prompt = synthetic_trace(PROMPT, seed=0, policy_version=version, valid=np.ones(4, dtype=bool))
    rest = synthetic_trace(tokens, seed=number + 1, policy_version=version)
    return RoutingTrace.concat([prompt, rest])


def with_row(trace: RoutingTrace, row: int, *, valid: bool = True) -> RoutingTrace:
    """Return the trace with other experts in one row, and perhaps no route there."""
    ids, held = trace.expert_ids.copy(), trace.valid.copy()
    ids[row], held[row] = (ids[row] + 1) % trace.num_experts, valid
    return replace(trace, expert_ids=ids, valid=held)


def content(trace: RoutingTrace) -> tuple:
    return (
        trace.expert_ids[trace.valid].tolist(),
        trace.valid.tolist(),
        trace.layers,
        trace.num_experts,
        trace.token_digest.tolist(),
        trace.origin,
    )


def join(traces) -> TraceGroup:
    return TraceGroup.join(traces, num_prompt_tokens=4, where="group 3")


def test_group_gives_back_what_was_joined():
    traces = [sample(0, 3), sample(1, 1), sample(2, 7, version=2)]
    assert [content(t) for t in join(traces).split()] == [content(t) for t in traces]


def test_group_holds_the_prompt_once():
    group = join([sample(n, 2) for n in range(8)])
    assert group.routes_bytes == (4 + 8 * 2) * 3 * 4
    assert group.num_different_rows == (0,) * 8


def test_group_keeps_no_sample_alive():
    traces = [sample(0, 3), sample(1, 3)]
    group = join(traces)
    held = [group.prompt, *group.completions]
    assert not any(
        np.shares_memory(part.expert_ids, trace.expert_ids) for part in held for trace in traces
    )


def test_group_keeps_a_prompt_row_that_another_sample_routed_otherwise():
    traces = [sample(0, 3), with_row(sample(1, 3), 2), sample(2, 3)]
    group = join(traces)
    assert group.num_different_rows == (0, 1, 0)
    assert group.differences[1].rows.tolist() == [2]
    assert [content(t) for t in group.split()] == [content(t) for t in traces]
    assert group.routes_bytes == (4 + 3 * 3 + 1) * 3 * 4


def test_control_without_the_differences_that_row_would_be_another_samples():
    traces = [sample(0, 3), with_row(sample(1, 3), 2)]
    group = join(traces)
    bare = replace(group, differences=(group.differences[0], group.differences[0]))
    assert content(bare.trace(1)) != content(traces[1])


@pytest.mark.parametrize("missing_in", [0, 1])
def test_group_keeps_which_sample_has_no_route_for_a_prompt_row(missing_in):
    traces = [sample(0, 3), sample(1, 3)]
    traces[missing_in] = with_row(traces[missing_in], 1, valid=False)
    group = join(traces)
    assert group.num_different_rows == (0, 1)
    assert [content(t) for t in group.split()] == [content(t) for t in traces]


def test_what_two_rows_without_a_route_hold_is_no_difference():
    first = replace(sample(0, 3), valid=np.array([False] * 4 + [True, True, False]))
    second = with_row(replace(sample(1, 3), valid=first.valid), 1, valid=False)
    assert join([first, second]).num_different_rows == (0, 0)


def test_samples_of_two_prompts_are_refused():
    other = RoutingTrace.concat([synthetic_trace(np.array([5, 6, 9, 8]), seed=0), sample(1, 3)])
    with pytest.raises(TokenMismatchError, match=r"group 3, sample 1: .* from row 2 of 4 on"):
        join([sample(0, 3), other])


@pytest.mark.parametrize("count", [0, 7, 8])
def test_a_prompt_length_that_leaves_no_sampled_token_is_refused(count):
    with pytest.raises(TraceError, match=f"sample 0: {count} prompt tokens of 7 rows"):
        TraceGroup.join([sample(0, 3)], num_prompt_tokens=count, where="group 3")


def test_a_trace_of_another_model_is_refused():
    with pytest.raises(TraceError, match=r"sample 1: .* a group is sampled by one model"):
        join([sample(0, 3), sample(1, 3).select_layers([0, 1])])


def test_an_empty_group_is_refused():
    with pytest.raises(TraceError, match="group 3: no trace to join"):
        join([])


def test_a_group_with_fewer_differences_than_samples_is_refused():
    group = join([sample(0, 3), sample(1, 3)])
    with pytest.raises(TraceError, match="2 completions has 1 differences and 2 origins"):
        replace(group, differences=group.differences[:1])


@pytest.mark.parametrize("rows", [[-1], [4], [2, 2], [3, 1]])
def test_differences_outside_the_prompt_are_refused(rows):
    group = join([sample(0, 3)])
    count = len(rows)
    difference = replace(
        group.differences[0],
        rows=np.array(rows),
        expert_ids=group.prompt.expert_ids[:count],
        valid=np.ones(count, dtype=bool),
    )
    with pytest.raises(TraceError, match="increasing rows of the prompt"):
        replace(group, differences=(difference,))


@given(st.data())
def test_any_group_gives_back_what_was_joined(data):
    traces = []
    for number in range(data.draw(st.integers(1, 4))):
        trace = sample(number, data.draw(st.integers(1, 5)), version=data.draw(st.integers(0, 2)))
        for row in data.draw(st.sets(st.integers(0, 3))):
            trace = with_row(trace, row, valid=data.draw(st.booleans()))
        traces.append(trace)
    assert [content(t) for t in join(traces).split()] == [content(t) for t in traces]
