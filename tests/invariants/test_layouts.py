"""A replayed step is the same step in every layout, schedule and recomputation."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from moe_replay.testing.layouts import CASES, Case, Step, layout, replayed_step
from moe_replay.testing.ranks import run_ranks

LAYERS = tuple(range(1, 8))
BOUND = 1e-5
"""Relative; float32 reductions in another order."""


@cache
def alone(checkpoint: Path, layers: tuple[int, ...]) -> Step:
    """Return the step of a single process."""
    (step,) = run_ranks(replayed_step, 1, checkpoint, Case(layout=layout(), ranks=1), layers)
    return step


def assert_same_step(steps: list[Step], expected: Step) -> None:
    found: dict[int, np.ndarray] = {}
    for step in steps:
        found |= step.old_logprobs
        assert step.loss == pytest.approx(expected.loss, rel=BOUND)
        assert step.grad_norm == pytest.approx(expected.grad_norm, rel=BOUND)
        assert step.gradients.keys() == expected.gradients.keys()
        for name, gradient in expected.gradients.items():
            error = (step.gradients[name] - gradient).norm() / (gradient.norm() + 1e-12)
            assert error < BOUND, name
    assert found.keys() == expected.old_logprobs.keys()
    for sample_id, values in expected.old_logprobs.items():
        error = np.abs(found[sample_id] - values).max() / np.abs(values).max()
        assert error < BOUND, sample_id


@pytest.mark.ranks
@pytest.mark.parametrize("name", CASES)
def test_replayed_step_equals_that_of_a_single_process(checkpoint: Path, name: str) -> None:
    case = CASES[name]
    steps = run_ranks(replayed_step, case.ranks, checkpoint, case, LAYERS)
    assert_same_step(steps, alone(checkpoint, LAYERS))
