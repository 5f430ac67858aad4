"""An auxiliary loss reaches the gradient, and leaves the policy's loss and the replay alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe_replay.grpo.loop import train
from moe_replay.recipe.recipe import ProcessSpec, Recipe
from moe_replay.report import RunDirectory, build_reporter
from moe_replay.testing.ranks import run_ranks


def first_step(recipe: Recipe) -> dict[str, Any]:
    """Train one step in a process of its own and return its metrics."""

    def call() -> None:
        directory = RunDirectory(recipe.run.output_dir)
        with build_reporter(
            recipe, rank=torch.distributed.get_rank(), run_directory=directory
        ) as reporter:
            train(recipe, process=ProcessSpec(), reporter=reporter, restart=True)

    run_ranks(call, 1)
    return json.loads((recipe.run.output_dir / "metrics.jsonl").read_text().splitlines()[0])


@pytest.mark.ranks
def test_auxiliary_loss_moves_the_gradient_and_nothing_else_of_the_first_step(
    recipe: Callable[..., Recipe],
) -> None:
    settings = {"run__max_steps": 1, "rollout__dtype": "float32"}
    without = first_step(recipe(**settings))
    balanced = first_step(recipe(megatron__moe_aux_loss_coeff=10.0, **settings))
    assert balanced["grad_norm"] > 1.5 * without["grad_norm"]
    # T16: before its weight. 1 is perfect balance; it cannot exceed the number of experts over
    # top-k.
    assert 1.0 < balanced["load_balancing_loss"] < 4.0
    assert "load_balancing_loss" not in without
    for key in ("loss", "reward", "replay/agreement", "replay/coverage", "entropy/mean"):
        assert balanced[key] == without[key], key


@pytest.mark.ranks
def test_a_weight_of_zero_is_no_auxiliary_loss(recipe: Callable[..., Recipe]) -> None:
    settings = {"run__max_steps": 1, "rollout__dtype": "float32"}
    without = first_step(recipe(**settings))
    zero = first_step(recipe(megatron__moe_aux_loss_coeff=0.0, **settings))
    assert zero["grad_norm"] == without["grad_norm"]
