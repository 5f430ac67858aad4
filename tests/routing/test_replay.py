"""Coverage: what counts, what does not, and when it is too little."""

import pytest

from moe_replay.errors import CoverageError
from moe_replay.routing import Coverage, LiveReason


def coverage(replayed: int, **live: int) -> Coverage:
    return Coverage.from_counts(replayed, live)


def test_fraction_leaves_rows_out_that_no_engine_could_return():
    assert coverage(3, last_token=1, padding=100).fraction == 1.0


@pytest.mark.parametrize("reason", ["prompt_omitted", "engine_gave_none"])
def test_fraction_counts_rows_that_an_engine_left_out(reason):
    assert coverage(3, **{reason: 1}).fraction == 0.75


def test_fraction_of_nothing_is_whole():
    assert Coverage().fraction == 1.0


def test_total_adds_rows_by_reason():
    whole = Coverage.total([coverage(3, padding=2), coverage(4, padding=1, last_token=5)])
    assert whole.num_replayed == 7
    assert whole.num_live[LiveReason.PADDING] == 3
    assert whole.num_live[LiveReason.LAST_TOKEN] == 5
    assert whole.num_live[LiveReason.PROMPT_OMITTED] == 0


def test_require_accepts_exactly_the_minimum():
    coverage(3, prompt_omitted=1).require(0.75)
    assert coverage(3, prompt_omitted=1).fraction == 0.75


def test_require_names_the_reasons_of_what_is_missing():
    with pytest.raises(CoverageError, match=r"coverage is 0.7500 .*prompt_omitted: 1, padding: 2"):
        coverage(3, prompt_omitted=1, padding=2).require(0.76)


def test_from_counts_refuses_a_reason_that_does_not_exist():
    with pytest.raises(ValueError, match="truncated"):
        Coverage.from_counts(1, {"truncated": 2})
