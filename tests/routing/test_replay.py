"""Coverage: what counts, what does not, and when it is too little."""

import numpy as np
import pytest

from moe_replay.errors import CoverageError, TraceError
from moe_replay.routing import Coverage, LiveReason


def coverage(replayed: int, **live: int) -> Coverage:
    return Coverage(
        num_replayed=replayed, num_live={LiveReason(reason): n for reason, n in live.items()}
    )


def test_fraction_leaves_rows_out_that_no_engine_could_return():
    assert coverage(3, last_token=1, padding=100).fraction == 1.0


@pytest.mark.parametrize("reason", ["prompt_omitted", "environment_omitted", "engine_gave_none"])
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


def live_by_reason(found: Coverage) -> dict[str, int]:
    return {str(reason): n for reason, n in found.num_live.items() if n}


def test_of_rows_counts_each_row_for_one_reason():
    valid = np.array([False, True, True, False, False, True, False, False])
    sampled = np.array([False, False, True, True, False, False, True, True])
    found = Coverage.of_rows(valid, prompt_length=2, is_sampled=sampled)
    assert found.num_replayed == 3
    assert live_by_reason(found) == {
        "prompt_omitted": 1,
        "engine_gave_none": 2,
        "environment_omitted": 1,
        "last_token": 1,
    }
    assert found.num_replayed + sum(found.num_live.values()) == len(valid)


def test_of_rows_takes_all_after_the_prompt_for_sampled():
    found = Coverage.of_rows(np.array([False, True, True, False, False]), prompt_length=2)
    expected = {"prompt_omitted": 1, "engine_gave_none": 1, "last_token": 1}
    assert (found.num_replayed, live_by_reason(found)) == (2, expected)


def test_of_rows_does_not_take_a_last_row_with_a_route_for_a_missing_one():
    assert live_by_reason(Coverage.of_rows(np.array([True, True]), prompt_length=1)) == {}


def test_of_rows_leaves_the_flags_as_they_are():
    valid = np.array([True, False])
    Coverage.of_rows(valid, prompt_length=1)
    assert valid.tolist() == [True, False]


@pytest.mark.parametrize(("prompt", "flags"), [(-1, 3), (4, 3), (1, 2)])
def test_of_rows_refuses_counts_that_do_not_fit(prompt, flags):
    with pytest.raises(TraceError, match=f"prompt of {prompt} tokens in 3 rows"):
        Coverage.of_rows(
            np.ones(3, dtype=bool), prompt_length=prompt, is_sampled=np.ones(flags, dtype=bool)
        )


def of_rows(valid: list[bool], prompt: int = 2) -> Coverage:
    return Coverage.of_rows(np.array(valid), prompt_length=prompt)


def test_rows_without_a_route_are_counted_by_reason():
    found = of_rows([False, True, False, True, False])
    assert found.num_replayed == 2
    assert found.num_live[LiveReason.PROMPT_OMITTED] == 1
    assert found.num_live[LiveReason.ENGINE_GAVE_NONE] == 1
    assert found.num_live[LiveReason.LAST_TOKEN] == 1
    assert found.fraction == 0.5


def test_a_last_row_without_a_route_costs_no_coverage():
    found = of_rows([True] * 4 + [False])
    assert {reason: n for reason, n in found.num_live.items() if n} == {LiveReason.LAST_TOKEN: 1}
    assert found.fraction == 1.0


def test_a_last_row_with_a_route_counts_as_replayed():
    assert of_rows([True] * 5).num_replayed == 5


def test_e16_rows_of_a_sample_without_a_sampled_token_belong_to_the_prompt():
    found = of_rows([True, True, False, False, False], prompt=5)
    assert found.num_replayed == 2
    assert found.num_live[LiveReason.PROMPT_OMITTED] == 2
    assert found.num_live[LiveReason.LAST_TOKEN] == 1
