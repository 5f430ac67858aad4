"""Figures of the closing table against numbers worked out by hand."""

from __future__ import annotations

import pytest

from moe_replay.grpo.records import EvalRecord, StepRecord
from moe_replay.report.summary import (
    eval_changes,
    live_comparison,
    metric_figures,
    push_speed,
    seconds_per_step,
)


def _steps(name: str, values: list[float]) -> list[StepRecord]:
    return [
        StepRecord(step=number, metrics={name: value}, seconds={})
        for number, value in enumerate(values, start=1)
    ]


HEADINGS = ("first 10 %", "last 10 %", "mean", "min", "max")


def test_first_and_last_are_means_of_a_tenth_of_the_steps() -> None:
    figures = metric_figures(_steps("reward", [float(value) for value in range(20)]), "reward")
    assert figures == dict(zip(HEADINGS, (0.5, 18.5, 9.5, 0.0, 19.0), strict=True))


def test_few_steps_still_have_a_first_and_a_last() -> None:
    figures = metric_figures(_steps("reward", [1.0, 5.0, 3.0]), "reward")
    assert figures == dict(zip(HEADINGS, (1.0, 3.0, 3.0, 1.0, 5.0), strict=True))


def test_steps_without_the_metric_are_left_out() -> None:
    steps = [*_steps("loss", [9.0]), *_steps("reward", [2.0])]
    figures = metric_figures(steps, "reward")
    assert figures is not None
    assert figures["mean"] == 2.0
    assert metric_figures(steps, "kl") is None


def test_replay_and_live_are_compared_on_the_steps_that_have_both() -> None:
    both = {"rollout_correction/k3_kl": 1e-4, "live_gap/k3_kl": 3e-3}
    steps = [
        StepRecord(step=1, metrics=both, seconds={}),
        StepRecord(step=2, metrics={"rollout_correction/k3_kl": 1.0}, seconds={}),
    ]
    assert live_comparison(steps) == (1, 1e-4, 3e-3)
    assert live_comparison(steps[1:]) is None


def test_gap_that_was_measured_live_is_not_compared_with_itself() -> None:
    same = {"rollout_correction/k3_kl": 1e-4, "live_gap/k3_kl": 1e-4}
    assert live_comparison([StepRecord(step=1, metrics=same, seconds={})]) is None


def test_evaluation_is_compared_before_and_after() -> None:
    records = [
        EvalRecord(step=step, metrics={"eval/reward": value, "eval/num_items": 64.0}, seconds=1.0)
        for step, value in ((0, 0.25), (5, 0.9), (10, 0.75))
    ]
    assert eval_changes(records) == {"": (records[0], records[2])}
    assert eval_changes([]) == {}
    two = EvalRecord(
        step=0,
        metrics={"eval/maths/reward": 0.5, "eval/rewards/reward": 0.1, "eval/maths/rewards/f": 0.2},
        seconds=1.0,
    )
    assert eval_changes([*records, two])["maths"] == (two, two)
    assert set(eval_changes([*records, two])) == {"", "maths"}


def test_seconds_of_a_station_are_averaged_over_all_steps() -> None:
    steps = [
        StepRecord(step=1, metrics={}, seconds={"rollout": 3.0}),
        StepRecord(step=2, metrics={}, seconds={"rollout": 1.0, "checkpoint": 4.0}),
    ]
    seconds = seconds_per_step(steps)
    assert seconds == pytest.approx({"rollout": 2.0, "checkpoint": 2.0})
    assert list(seconds) == ["rollout", "checkpoint"]


def test_the_speed_of_pushes_is_their_bytes_over_their_seconds() -> None:
    steps = [
        StepRecord(step=n, metrics={"sync/bytes": 40e6}, seconds={"sync": s, "update": 9.0})
        for n, s in ((1, 0.3), (2, 0.5))
    ]
    assert push_speed(steps) == pytest.approx(100.0)
    # A run without a push, and records of a release that did not count bytes.
    assert push_speed([]) is None
    assert push_speed([StepRecord(step=1, metrics={}, seconds={"sync": 1.0})]) is None
