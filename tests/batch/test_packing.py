"""Microbatches keep the budget, hold every sample once, and are the same on every rank."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_replay.batch import plan_microbatches
from moe_replay.batch.packing import split_to, spread_over
from moe_replay.errors import RecipeError

lengths_lists = st.lists(st.integers(1, 20), max_size=30)


def test_plan_fills_the_budget_with_what_fits():
    assert plan_microbatches([4, 1, 3], max_tokens=4, max_samples=None) == [[0], [1, 2]]


def test_plan_without_limits_is_one_microbatch():
    assert plan_microbatches([4, 1, 3], max_tokens=None, max_samples=None) == [[0, 1, 2]]


def test_plan_of_nothing_is_nothing():
    assert plan_microbatches([], max_tokens=4, max_samples=1) == []


@given(lengths_lists, st.integers(20, 60), st.none() | st.integers(1, 4))
def test_plan_holds_every_sample_once_within_both_limits(lengths, max_tokens, max_samples):
    groups = plan_microbatches(lengths, max_tokens=max_tokens, max_samples=max_samples)
    assert sorted(p for group in groups for p in group) == list(range(len(lengths)))
    assert all(sum(lengths[p] for p in group) <= max_tokens for group in groups)
    assert all(len(group) <= (max_samples or len(lengths)) for group in groups)


@given(lengths_lists)
def test_plan_leaves_no_two_microbatches_that_would_fit_together(lengths):
    groups = plan_microbatches(lengths, max_tokens=20, max_samples=None)
    used = sorted(sum(lengths[p] for p in group) for group in groups)
    assert len(used) < 2 or used[0] + used[1] > 20


def test_plan_refuses_a_sequence_over_the_budget():
    with pytest.raises(
        RecipeError, match=r"21 tokens does not fit batch.max_tokens_per_microbatch = 20"
    ):
        plan_microbatches([3, 21], max_tokens=20, max_samples=None)


def spread(lengths, count, *, max_tokens=None, max_samples=None):
    """Spread lengths over ``count`` microbatches, with their squares as work."""
    groups = plan_microbatches(lengths, max_tokens=max_tokens, max_samples=max_samples)
    return spread_over(
        groups,
        max(count, len(groups)),
        lengths=lengths,
        work=[float(length**2) for length in lengths],
        max_tokens=max_tokens,
        max_samples=max_samples,
    )


def test_spread_evens_out_work_and_puts_the_most_first():
    # Squares 36, 16, 9, 9, 4: 36 against 38, where tokens alone would have put 6 and 2 together.
    assert spread([3, 6, 2, 4, 3], 2) == [[0, 2, 3, 4], [1]]
    assert spread([1, 6], 2) == [[1], [0]]


def test_spread_keeps_the_plan_where_dealing_by_work_breaks_the_budget():
    # By work 5 and 4, 5 and 3: the last 3 fits neither into 10 tokens. The plan had room for it.
    assert spread([5, 5, 4, 3, 3], 2, max_tokens=10) == [[0, 1], [2, 3, 4]]


def test_t10_fewer_samples_than_microbatches_leave_some_of_padding_alone():
    assert spread([2, 5, 3], 4) == [[1], [2], [0], []]
    assert split_to([[0, 1], [2]], [2, 5, 3], 4) == [[0], [1], [2], []]


@given(lengths_lists, st.integers(20, 60), st.none() | st.integers(1, 4), st.integers(0, 34))
def test_spread_holds_every_sample_once_within_both_limits(lengths, max_tokens, max_samples, count):
    least = len(plan_microbatches(lengths, max_tokens=max_tokens, max_samples=max_samples))
    groups = spread(lengths, count, max_tokens=max_tokens, max_samples=max_samples)
    assert len(groups) == max(count, least)
    assert sorted(p for group in groups for p in group) == list(range(len(lengths)))
    assert all(sum(lengths[p] for p in group) <= max_tokens for group in groups)
    assert all(len(group) <= (max_samples or len(lengths)) for group in groups)
    work = [sum(lengths[p] ** 2 for p in group) for group in groups]
    assert work == sorted(work, reverse=True)
