"""A loss, like an advantage estimator, is one function in a file and one name in the recipe."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Literal, get_args

import numpy as np
import pytest
from pydantic import ValidationError

from moe_replay.grpo import estimators, losses
from moe_replay.grpo.advantage import group_advantages
from moe_replay.grpo.loss import sample_weights
from moe_replay.grpo.losses import BatchSize
from moe_replay.recipe.sections.training import GrpoSection

SIZE = BatchSize(num_samples=2, num_tokens=6, max_completion_length=10)


def named(key: str) -> set[str]:
    """Return the values that a key of ``[grpo]`` takes."""
    return set(get_args(GrpoSection.model_fields[key].annotation))


def defined(module: ModuleType) -> set[str]:
    """Return the functions that a module defines."""
    return {
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__
    }


@pytest.mark.parametrize(
    ("key", "module"), [("loss_type", losses), ("advantage_estimator", estimators)]
)
def test_every_name_has_its_function_and_every_function_its_name(
    key: str, module: ModuleType
) -> None:
    assert named(key) == defined(module) != set()


def test_control_a_function_without_a_name_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = _in(losses, lambda length, batch: 1.0)
    monkeypatch.setattr(losses, "scratch", scratch, raising=False)
    assert defined(losses) - named("loss_type") == {"scratch"}


def test_a_scratch_loss_is_one_function_and_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Extended(GrpoSection):
        loss_type: Literal["grpo", "scratch"] = "grpo"

    monkeypatch.setattr(losses, "scratch", lambda length, batch: length / 2, raising=False)
    chosen = Extended(loss_type="scratch").loss_type
    weights = sample_weights([4, 6], [True, True], loss_type=chosen, batch=SIZE)
    assert weights.tolist() == [2.0, 3.0]
    with pytest.raises(ValidationError, match="loss_type"):
        GrpoSection.model_validate({"loss_type": "scratch"})


def test_a_scratch_estimator_is_one_function_and_one_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Extended(GrpoSection):
        advantage_estimator: Literal["grpo", "scratch"] = "grpo"

    monkeypatch.setattr(
        estimators, "scratch", lambda centred, num_counted: 2 * centred, raising=False
    )
    chosen = Extended(advantage_estimator="scratch").advantage_estimator
    found = group_advantages(np.array([[1.0, 0.0]]), scale_rewards="none", estimator=chosen)
    assert found.advantages.tolist() == [[1.0, -1.0]]


def _in(module: ModuleType, function):
    function.__module__ = module.__name__
    return function
