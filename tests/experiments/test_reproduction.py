"""The page of the reproduction is what its results give; figures are those of hand-made data."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))

import controls
import engine_routes
import precision
import precision_picture
import reproduction_results
from reproduction_results import filled, percent, plain, read_rows, scientific

from moe_replay.diagnose import Measured
from moe_replay.routing import Origin, RoutingTrace

TOKENS = 8


def trace(seed: int = 0, *, tokens: int = TOKENS, num_experts: int = 32) -> RoutingTrace:
    rng = np.random.default_rng(seed)
    ids = rng.random((tokens, 8, num_experts)).argsort(axis=2)[..., :4]
    valid = np.ones(tokens, dtype=bool)
    valid[-1] = False
    return RoutingTrace.record(
        ids.astype(np.uint8),
        token_ids=np.arange(tokens, dtype=np.int32),
        valid=valid,
        layers=range(8),
        num_experts=num_experts,
        origin=Origin.single(engine="made", engine_version="0", policy_version=0, num_rows=tokens),
    )


def case(num_prompt: int = 3) -> controls.Case:
    measured = Measured(
        name="0/0/0",
        prompt=0,
        token_ids=np.arange(TOKENS, dtype=np.int32),
        recorded=trace(),
        live=None,
    )
    return controls.Case(
        measured=measured, num_prompt=num_prompt, others=[trace(1).expert_ids[:-1]]
    )


@pytest.mark.parametrize("experiment", [precision, controls, engine_routes])
def test_the_tables_of_the_page_are_those_of_the_results(experiment):
    page = reproduction_results.PAGE.read_text()
    for name, text in experiment.tables().items():
        assert filled(page, name, text) == page, (
            f"docs/reproduction.md: run python experiments/{experiment.__name__}.py --table"
        )


def test_every_cell_has_a_hundred_thousand_tokens():
    rows = read_rows("precision")
    assert len(rows) == 8
    assert min(row["tokens"] for row in rows.values()) >= 100_000


def test_the_figure_is_that_of_the_results():
    drawn = precision_picture.picture_of(read_rows("precision"))
    assert precision_picture.OUT.read_text() == drawn


def test_the_figure_draws_a_bar_for_each_gap_at_its_value():
    gap = {"k3": [1e-3, 9e-4, 1.1e-3]}
    rows = {
        f"{model} {engine} {trainer}": {"live": gap, "replayed": {"k3": [1e-4, 9e-5, 1.1e-4]}}
        for model in ("moe", "twin")
        for engine in precision.DTYPES
        for trainer in precision.DTYPES
    }
    drawn = ElementTree.fromstring(precision_picture.picture_of(rows))
    boxes = list(drawn.iter("{http://www.w3.org/2000/svg}rect"))
    # Three decades, so that 1e-3 is at two thirds and 1e-4 at one third.
    width = precision_picture.WIDTH - precision_picture.LEFT - precision_picture.RIGHT
    for kind, share in (("more", 2 / 3), ("same", 1 / 3)):
        widths = [float(box.get("width")) for box in boxes if box.get("class") == kind]
        assert widths == pytest.approx([share * width] * 3, rel=1e-3)


def test_a_ratio_of_equal_gaps_is_one_with_an_interval_around_it():
    rng = np.random.default_rng(0)
    tokens = [10] * 400
    one = rng.exponential(1.0, 400).tolist()
    other = one[::-1]
    found = precision.ratio(one, tokens, precision.Sums(live=other, tokens=tokens))
    assert found.value == pytest.approx(1.0)
    assert found.low < 1 < found.high
    assert found.high - found.low < 0.6
    doubled = precision.ratio(
        [2.5 * value for value in one], tokens, precision.Sums(live=other, tokens=tokens)
    )
    assert doubled.low > 2


def test_a_ratio_is_judged_by_its_interval():
    assert precision.judged((1.5, 1.2, 1.9)) == "confirmed"
    assert precision.judged((2.6, 2.1, 3.0)) == "refuted"
    assert precision.judged((1.8, 1.4, 2.2)) == "undecided"


def test_gaps_by_seed_are_means_over_tokens(monkeypatch):
    monkeypatch.setattr(precision, "SEEDS", (0, 1, 2, 3))
    # Two sequences a seed: (1 + 3) / (2 + 6), and so on.
    sums, tokens = [1.0, 3.0, 2.0, 2.0, 4.0, 4.0, 0.0, 8.0], [2, 6, 4, 4, 4, 4, 8, 8]
    assert precision.by_seed(sums, tokens) == [0.5, 0.5, 1.0, 0.5]


def test_controls_change_the_rows_that_they_name():
    made, rng = case(), np.random.default_rng(0)
    own = made.trace.expert_ids
    assert np.array_equal(controls.CONTROLS["a token late"](made, rng).expert_ids[1:-1], own[:-2])
    rotated = controls.CONTROLS["layers rotated by one"](made, rng).expert_ids
    assert np.array_equal(rotated[:-1, 1:], own[:-1, :-1])
    late = controls.CONTROLS["one layer a token late"](made, rng).expert_ids
    assert np.array_equal(late[1:-1, controls.LAYER], own[:-2, controls.LAYER])
    others = [layer for layer in range(8) if layer != controls.LAYER]
    assert np.array_equal(late[:, others], own[:, others])
    other = controls.CONTROLS["routes of another sample"](made, rng).expert_ids
    assert np.array_equal(other[:-1], trace(1).expert_ids[:-1])


def test_controls_of_coverage_keep_the_ids_and_leave_rows_live():
    made, rng = case(num_prompt=3), np.random.default_rng(0)
    prompt_live = controls.CONTROLS["prompts live"](made, rng)
    assert prompt_live.valid.tolist() == [False] * 3 + [True] * 4 + [False]
    completion_live = controls.CONTROLS["completions live"](made, rng)
    assert completion_live.valid.tolist() == [True] * 3 + [False] * 5
    half = [
        controls.CONTROLS["half of the rows, at random"](made, np.random.default_rng(n)).num_valid
        for n in range(200)
    ]
    assert 3 < np.mean(half) < 4
    assert np.array_equal(prompt_live.expert_ids, made.trace.expert_ids)


def test_a_comparison_counts_the_pairs_whose_experts_differ():
    one = trace()
    ids = one.expert_ids.copy()
    # Another order is the same set; another expert is not.
    ids[0, 0] = ids[0, 0][::-1]
    ids[2, 5, 0] = next(e for e in range(32) if e not in ids[2, 5])
    other = RoutingTrace(
        expert_ids=ids,
        valid=one.valid,
        layers=one.layers,
        num_experts=one.num_experts,
        token_digest=one.token_digest,
        origin=one.origin,
    )
    row = engine_routes.compared("name", "float32", [one], [other])
    assert (row["flips"], row["pairs"]) == (1, 7 * 8)


def test_the_page_must_have_the_marks_of_a_table():
    page = "before\n<!-- gaps -->\nold\n<!-- end of gaps -->\nafter\n"
    new = filled(page, "gaps", "| new |\n")
    assert new == "before\n<!-- gaps -->\n\n| new |\n\n<!-- end of gaps -->\nafter\n"
    with pytest.raises(ValueError, match="once each"):
        filled(page, "routes", "| new |\n")


def test_figures_are_shown_with_their_intervals():
    assert scientific([0.0012, 0.0009, 0.0015]) == "1.2e-3 [9.0e-4, 1.5e-3]"
    assert percent([0.0012, 0.0009, 0.0015]) == "0.120 [0.0900, 0.150] %"
    assert percent([0.0, 0.0, 0.0], num_tokens=100_000) == "none, < 0.003 %"
    assert plain([1.234, None, None]) == "1.23"
