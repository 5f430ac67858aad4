"""Microbatches keep the budget, hold every sample once, and are the same on every rank."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_replay.batch import plan_microbatches
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
