"""Means over tokens, intervals over sequences, bounds and margins, by hand."""

import math

import numpy as np
import pytest

from moe_replay.diagnose.statistics import Margins, TokenSums, bound_of_unseen, resampled_means


def filled(*sequences: list[float]) -> TokenSums:
    sums = TokenSums()
    for values in sequences:
        sums.add({"x": np.array(values), "half": np.array(values) / 2})
    return sums


def test_means_are_over_tokens_and_empty_sequences_add_nothing():
    sums = filled([1.0, 2.0, 3.0], [], [6.0])
    assert (sums.num_tokens, sums.num_sequences) == (4, 2)
    assert sums.means(seed=0)["x"].value == 3.0
    assert sums.sequence_means("x").tolist() == [2.0, 6.0]


def test_resampled_means_of_two_sequences_are_those_of_the_three_ways_to_draw_two():
    drawn = resampled_means(np.array([[6.0], [6.0]]), np.array([3.0, 1.0]), seed=1)
    # Twice the first: 12 / 6. One of each: 12 / 4. Twice the second: 12 / 2.
    assert set(np.round(drawn[:, 0], 9)) == {2.0, 3.0, 6.0}
    share = (np.round(drawn[:, 0], 9) == 3.0).mean()
    assert 0.45 < share < 0.55
    again = resampled_means(np.array([[6.0], [6.0]]), np.array([3.0, 1.0]), seed=1)
    assert (again == drawn).all()
    assert not (
        resampled_means(np.array([[6.0], [6.0]]), np.array([3.0, 1.0]), seed=2) == drawn
    ).all()


def test_intervals_cover_a_known_mean_as_often_as_they_claim():
    rng, inside = np.random.default_rng(3), 0
    for trial in range(200):
        sums = TokenSums()
        for _ in range(40):
            # Tokens of a sequence share a part, so that tokens are no independent evidence.
            sums.add({"x": rng.normal() + rng.normal(size=20)})
        found = sums.means(seed=trial, num_resamples=300)["x"]
        inside += found.low <= 0 <= found.high
    assert 0.88 < inside / 200 <= 0.99


def test_one_sequence_has_no_interval():
    found = filled([1.0, 3.0]).means(seed=0)["x"]
    assert found.value == 2.0
    assert math.isnan(found.low)
    assert not found.has_interval


def test_removed_share_is_paired_by_token():
    # Half of every token is removed, however the tokens differ: no error at all.
    found = filled([1.0, 9.0], [100.0], [3.0]).removed_share("x", "half", seed=0)
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    assert math.isnan(filled([0.0], [0.0]).removed_share("x", "half", seed=0).value)


def test_what_was_not_seen_in_n_tokens_has_at_most_3_of_n():
    assert bound_of_unseen(600) == 0.005
    assert (1 - bound_of_unseen(600)) ** 600 == pytest.approx(0.05, abs=0.001)
    assert bound_of_unseen(2) == 1.0
    assert math.isnan(bound_of_unseen(0))


def test_margins_tell_flips_at_near_ties_from_flips_anywhere():
    margins = Margins()
    found = np.geomspace(1e-4, 1.0, 101)[:, None]
    flipped = np.zeros((101, 1), dtype=bool)
    flipped[[0, 2, 4, 80]] = True
    margins.add(found, flipped)
    # Flips are entries 0, 2, 4 and 80; of the 97 kept, the 49th is entry 51.
    assert margins.median_flipped == pytest.approx(found[2, 0], rel=0.03)
    assert margins.median_kept == pytest.approx(found[51, 0], rel=0.03)
    assert margins.near_ties_frac == 0.75
    assert math.isnan(Margins().near_ties_frac)
