"""Figures carry the numbers of the run, and stay small however long it was."""

from __future__ import annotations

from dataclasses import replace

import plotly.graph_objects
import pytest

from moe_replay.grpo.records import StepRecord
from moe_replay.report.page.cost import memory_figure, stations_figure
from moe_replay.report.page.figure import Figure, label
from moe_replay.report.page.learning import (
    gap_figure,
    held_out_figure,
    reward_figure,
    tail_figure,
    tail_over_steps_figure,
)
from moe_replay.report.page.routing import (
    agreement_figure,
    coverage_figure,
    flip_figures,
    flip_map,
    live_rows_figure,
)
from moe_replay.report.page.runs import open_runs
from moe_replay.report.page.thinning import bins, thinned


@pytest.fixture(scope="module")
def runs(tmp_path_factory, make_run):
    """A run with R3, one without replay, and one with a dropped sample in its second step."""
    folder = tmp_path_factory.mktemp("runs")
    return open_runs(
        [
            make_run(folder / "R3"),
            make_run(folder / "disabled", mode="disabled"),
            make_run(folder / "planted", dropped_step=2),
        ]
    )


def trace(figure: Figure, name: str):
    (found,) = [each for each in figure.traces if each.get("name") == name]
    return found


def test_lines_are_the_metrics_of_the_steps(runs):
    reward = trace(reward_figure(runs), "R3")
    assert (reward["x"], reward["y"]) == ([1, 2, 3], [0.1, 0.2, 0.3])
    held_out = trace(held_out_figure(runs), "disabled")
    assert (held_out["x"], held_out["y"]) == ([0, 3], [0.25, 0.5])
    assert trace(gap_figure(runs), "planted")["y"] == [0.001, 0.002, 0.003]
    assert trace(tail_over_steps_figure(runs), "R3")["y"] == [0.02] * 3


def test_the_gap_is_never_one_number_with_the_drift(runs):
    still = gap_figure(runs)
    assert {each.get("yaxis") for each in still.traces} == {"y"}
    assert "No token was clipped in any step" in still.note
    moved = replace(
        runs[0],
        steps=tuple(
            replace(r, metrics={**r.metrics, "clip_ratio/region_mean": 0.1}) for r in runs[0].steps
        ),
    )
    drawn = gap_figure([moved])
    assert [each["y"] for each in drawn.traces if each["yaxis"] == "y2"] == [[0.1] * 3]
    assert drawn.note == ""


def test_a_share_of_0_has_no_point_on_a_log_scale(runs):
    assert trace(tail_figure(runs), "R3")["y"] == [0.02, 0.002, None]


def test_replay_is_compared_with_live_routing_over_the_same_steps(runs):
    """Only the second of three steps measured both; the first is a worse one under replay."""

    def tail(prefix, share):
        return {f"{prefix}/extreme_frac_tau_{tau}": share for tau in ("1.1", "1.5", "2")}

    first, second, third = (replace(r, metrics=dict(r.metrics)) for r in runs[0].steps)
    first.metrics.update(tail("rollout_correction", 0.9))
    second.metrics.update(tail("rollout_correction", 0.01) | tail("live_gap", 0.3))
    figure = tail_figure([replace(runs[0], steps=(first, second, third))])
    assert trace(figure, "R3")["y"] == [0.01] * 3
    assert trace(figure, "R3 with live routing")["y"] == [0.3] * 3
    assert "R3: 1 of 3 steps measured live routing too" in figure.note
    assert [row[:2] for row in figure.table.rows] == [["R3", "1"], ["R3 with live routing", "1"]]
    # Where no step has both, the line is over all of them: (0.9 + 0.01 + 0.02) / 3.
    del second.metrics["live_gap/extreme_frac_tau_2"]
    alone = tail_figure([replace(runs[0], steps=(first, second, third))])
    assert (trace(alone, "R3")["y"][0], alone.note) == (0.31, "")


def test_flips_are_by_layer_and_step_on_one_scale_and_only_of_runs_that_replay(runs):
    figures = flip_figures(runs)
    assert [figure.key for figure in figures] == ["flips-0", "flips-2"]
    (heat,) = figures[0].traces
    assert (heat["x"], heat["y"]) == ([1, 2, 3], [1, 2])
    assert heat["z"] == [[0.01, 0.02, 0.03], [0.03, 0.03, 0.03]]
    assert {figure.traces[0]["zmax"] for figure in figures} == {0.03}
    assert figures[0].table.rows == [["1", "2.00 %", "3.00 %"], ["2", "3.00 %", "3.00 %"]]


def test_the_dropped_sample_is_marked_and_first_in_the_table(runs):
    figure = agreement_figure(runs)
    marked = trace(figure, "planted dropped")
    assert (marked["x"], marked["y"]) == ([2], [0.6])
    assert marked["text"] == ["step 2, sample 1 (dataset item 42): dropped"]
    assert list(figure.table.rows[0]) == ["planted", "2", "1", "42", "–", "60.00 %", "dropped"]
    assert all(row[-1] == "" for row in figure.table.rows[1:])
    assert not [each for each in figure.traces if each["name"] == "R3 dropped"]


def test_coverage_live_rows_and_seconds_are_those_of_the_run(runs):
    assert trace(coverage_figure(runs), "R3")["y"] == [1.0] * 3
    rows = trace(live_rows_figure(runs), "R3")
    # Padding was never there, so it has no bar.
    assert (rows["y"], rows["x"]) == (["last token"], [4.0])
    rollout = trace(stations_figure(runs), "rollout")
    assert (rollout["y"], rollout["x"]) == (["R3", "disabled", "planted"], [2.0] * 3)


def test_what_no_run_recorded_is_said(runs):
    assert memory_figure(runs).traces == []
    assert "measured on GPUs only" in memory_figure(runs).says
    assert coverage_figure(runs[1:2]).says == "No run replays."


def test_every_figure_is_one_that_plotly_knows(runs):
    figures = [
        reward_figure(runs),
        held_out_figure(runs),
        gap_figure(runs),
        tail_figure(runs),
        tail_over_steps_figure(runs),
        *flip_figures(runs),
        coverage_figure(runs),
        live_rows_figure(runs),
        agreement_figure(runs),
        stations_figure(runs),
    ]
    for figure in figures:
        plotly.graph_objects.Figure(_black(figure.traces), figure.layout)
    with pytest.raises(ValueError, match="Invalid property"):
        plotly.graph_objects.Figure([{"type": "scatter", "colour": "red"}])


def _black(value):
    """Replace the colours of the theme, which plotly does not know, by one that it does."""
    if isinstance(value, dict):
        return {key: _black(each) for key, each in value.items() if each != "@sequential"}
    if isinstance(value, list | tuple):
        return [_black(each) for each in value]
    return "#000" if isinstance(value, str) and value.startswith("@") else value


def test_neighbouring_steps_share_a_point_with_mean_and_extremes():
    assert bins(7, 3) == [range(0, 3), range(3, 6), range(6, 7)]
    series = thinned([(1, 1.0), (2, 3.0), (3, 5.0), (4, 5.0), (5, 8.0)], limit=2)
    assert (series.steps, series.mean) == ((3, 5), (3.0, 6.5))
    assert (series.low, series.high, series.steps_a_point) == ((1.0, 5.0), (5.0, 8.0), 3)


def test_a_single_low_sample_among_thousands_of_steps_stays_visible(runs):
    steps = tuple(
        StepRecord(
            step=number,
            metrics={"replay/agreement_min_sample": 0.4 if number == 777 else 0.97},
            seconds={},
        )
        for number in range(1, 5001)
    )
    figure = agreement_figure([replace(runs[0], steps=steps)])
    line = trace(figure, "R3 lowest sample")
    assert len(line["x"]) == 500
    assert (777, 0.4) in zip(line["x"], line["y"], strict=True)
    assert "each point is the lowest of up to 10 neighbouring steps" in figure.note
    assert len([each for each in figure.traces if "fill" in each]) == 0


def test_two_steps_a_point_are_said_and_one_is_not(runs):
    """501 steps give 251 points, fewer than the most that a line may have."""
    step = StepRecord(step=1, metrics={"replay/agreement_min_sample": 0.97}, seconds={})
    steps = tuple(replace(step, step=number) for number in range(1, 502))
    figure = agreement_figure([replace(runs[0], steps=steps)])
    assert len(trace(figure, "R3 lowest sample")["x"]) == 251
    assert "each point is the lowest of up to 2 neighbouring steps" in figure.note
    short = agreement_figure([replace(runs[0], steps=steps[:500])])
    assert "neighbouring" not in short.note


def test_a_heat_map_of_ten_thousand_steps_and_128_layers_has_240_columns():
    held = {"layers": list(range(128)), "flip_frac": [0.25] * 128}
    step = StepRecord(step=1, metrics={}, seconds={}, details={"replay/flip_frac": held})
    found = flip_map([replace(step, step=number) for number in range(1, 10_001)])
    # 42 steps a column: 238 whole ones and one of 4.
    assert (len(found.layers), len(found.steps), found.steps_a_column) == (128, 239, 42)
    assert found.steps[:2] == [42, 84] and found.steps[-1] == 10_000
    assert found.flip_frac[127] == [0.25] * 239


def test_labels_hold_no_markup_and_nothing_that_reorders_text():
    assert label('<a href="x">\u202e') == '&lt;a href="x"&gt;⟨U+202E⟩'
