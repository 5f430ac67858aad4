"""Log-probabilities are counted at their own place and at the places beside it."""

from __future__ import annotations

import numpy as np
import pytest

from moe_replay.routing.guard.beside import EARLY, LATE, PlaceCount, count_shifts, strongest

OURS = np.array([-0.1, -2.0, -0.5, -3.0], dtype=np.float32)


def test_a_late_value_is_nearer_to_the_token_before():
    counts = count_shifts(np.array([-9.0, -0.1, -2.0, -0.5], dtype=np.float32), OURS)
    late = counts[LATE]
    assert (late.nearer, late.farther) == (3, 0)
    assert late.own == pytest.approx(1.9 + 1.5 + 2.5) and late.other == pytest.approx(0, abs=1e-6)
    # Three tokens that all speak for it: 3 ln 2 nats.
    assert late.nats == pytest.approx(3 * np.log(2), rel=1e-6)
    assert strongest(counts, 2.0) == LATE and strongest(counts, 2.1) is None
    assert not counts[EARLY].is_better


def test_right_values_are_nearer_to_their_own_token():
    counts = count_shifts(OURS + np.float32(0.01), OURS)
    assert all(each.nearer == 0 and each.farther == 3 for each in counts.values())
    assert strongest(counts, 0.0) is None


def test_tokens_that_fit_both_places_say_nothing():
    equal = np.full(5, -0.3, dtype=np.float32)
    assert all(each.num_telling == 0 for each in count_shifts(equal, equal).values())


def test_counts_add_up_over_samples():
    one = PlaceCount(nearer=1, farther=2, own=3.0, other=4.0)
    assert PlaceCount.total([one, one]) == PlaceCount(nearer=2, farther=4, own=6.0, other=8.0)
    assert PlaceCount.total([]) == PlaceCount()
