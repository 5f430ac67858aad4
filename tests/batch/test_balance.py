"""Samples are dealt by work, the same way everywhere, and evenly."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_replay.batch.balance import deal, work_of


def test_work_is_the_tokens_that_each_token_attends_to_and_those_that_the_weights_are_worth():
    assert work_of(1000, 17_000) == 18_000_000
    assert work_of(17_000, 17_000) == 32 * work_of(1000, 17_000) + 2_000_000


def test_the_most_work_goes_first_to_the_part_with_least():
    assert deal([5, 4, 3, 3, 1], 2) == [[0, 3], [1, 2, 4]]


def test_ties_go_by_position_and_to_the_first_part():
    assert deal([2, 2, 2, 2, 2], 2) == [[0, 2, 4], [1, 3]]


def test_fewer_samples_than_parts_leave_empty_ones():
    assert deal([1, 7], 4) == [[1], [0], [], []]


def test_a_full_part_is_passed_over_and_no_room_at_all_is_said():
    # Part 1 has least work after 5 and 1, but no room.
    one_each = lambda part, position: len(part) < (2 if 0 in part else 1)  # noqa: E731
    assert deal([5, 1, 1], 2, has_room=one_each) == [[0, 2], [1]]
    assert deal([5, 1, 1, 1], 2, has_room=one_each) is None


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 8))
def test_every_sample_is_dealt_once_and_no_part_is_behind_by_more_than_one_sample(work, parts):
    dealt = deal(work, parts)
    assert sorted(p for part in dealt for p in part) == list(range(len(work)))
    loads = [sum(work[p] for p in part) for part in dealt]
    for part, load in zip(dealt, loads, strict=True):
        if part:
            assert load - min(work[p] for p in part) <= min(loads)


@pytest.mark.parametrize("replicas", [8, 64])
def test_long_tailed_lengths_are_even_to_two_per_cent_where_positions_are_not(replicas):
    seed = 13
    print("seed", seed)
    draw = np.random.default_rng(seed).lognormal(np.log(4096), 0.8, 16 * replicas)
    work = [work_of(min(int(n) + 1, 32_768), 15_500) for n in draw]
    mean = sum(work) / replicas
    assert max(sum(work[p] for p in part) for part in deal(work, replicas)) / mean < 1.02
    by_position = [sum(work[16 * n : 16 * n + 16]) for n in range(replicas)]
    assert max(by_position) / mean > 1.2
