"""Planted faults are what their names say, and shifted log-probabilities alone move the mean."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))

import first_ratio

ROWS = {row.name: row for row in first_ratio.ROWS}
IDS = np.array([[[0, 17], [2, 3]], [[4, 5], [6, 22]], [[8, 9], [10, 11]]])
"""Three rows, two layers, top-2."""


def test_plants_move_routes_as_they_say():
    assert first_ratio.one_row_early(IDS, []).tolist() == [*IDS[1:].tolist(), IDS[2].tolist()]
    assert first_ratio.layers_rotated(IDS, [])[0].tolist() == [[2, 3], [0, 17]]
    assert first_ratio.first_experts(IDS, [])[1].tolist() == [[0, 1], [0, 1]]
    assert first_ratio.wrapped(IDS, [])[:2].tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    strewn = first_ratio.random_experts(IDS, [])
    assert strewn.shape == IDS.shape
    assert (strewn != IDS).any() and (strewn[..., 0] != strewn[..., 1]).all()


@pytest.fixture(scope="module")
def groups() -> first_ratio.Groups:
    return first_ratio.sample("bfloat16", temperature=1.0, top_p=1.0, num_prompts=4)


@pytest.mark.parametrize(
    ("change", "num_changed"),
    [
        (first_ratio.each(first_ratio.half_covered), 32),
        (first_ratio.of_one_in_32(first_ratio.half_covered), 1),
        (first_ratio.routed(first_ratio.layers_rotated), 32),
        (first_ratio.routed(first_ratio.layers_rotated, one_of_32=True), 1),
    ],
    ids=["all uncovered", "one uncovered", "all rotated", "one rotated"],
)
def test_a_fault_is_in_as_many_samples_as_its_row_says(change, num_changed, groups):
    before, after = first_ratio.samples_of(groups), first_ratio.samples_of(change(groups))
    differs = [
        (a.trace.expert_ids != b.trace.expert_ids).any() or (a.trace.valid != b.trace.valid).any()
        for a, b in zip(before, after, strict=True)
    ]
    assert sum(differs) == num_changed


@pytest.mark.ranks
def test_wrong_routes_do_not_raise_the_mean_ratio_and_shifted_logprobs_do(groups):
    def of(name: str) -> dict:
        return first_ratio.statistics(first_ratio.log_ratios(ROWS[name], groups))

    right, wrong = of("nothing; R3"), of("layers rotated by one")
    shifted = of("log-probabilities one token late")
    assert right["samples"] == 32 and right["tokens"] == wrong["tokens"] == shifted["tokens"]
    assert right["ratio_mean"][0] == pytest.approx(1, abs=0.02)
    assert wrong["ratio_mean"][0] < 1.5 and wrong["k3_kl"][0] > 100 * right["k3_kl"][0]
    assert shifted["ratio_mean"][0] > 3
    assert shifted["percentiles"]["50"] == pytest.approx(1, abs=0.1)


def test_the_page_is_what_the_results_give():
    page = first_ratio.PAGE.read_text()
    shown = first_ratio.shown(first_ratio.read_results())
    assert first_ratio.put(page, "first-ratio", shown) == page, (
        "run python experiments/first_ratio.py --table"
    )
