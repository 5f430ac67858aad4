"""A collapsed router is counted and trained on; an engine that missed a layer is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_replay.errors import DivergedError, MisalignmentError
from moe_replay.grpo.engines import recipe_engine
from moe_replay.grpo.guard.collapse import LiveSets
from moe_replay.grpo.loop import train
from moe_replay.megatron.replay.overlap import RouteUse
from moe_replay.recipe.recipe import ProcessSpec, Recipe
from moe_replay.report import RunDirectory, build_reporter
from moe_replay.routing import RoutingTrace
from moe_replay.testing.ranks import run_ranks

Recipes = Callable[..., Recipe]
LONG = {
    "rollout__max_completion_length": 80,
    "rollout__dtype": "float32",
    "run__max_steps": 2,
    "checkpoint__export": "false",
}


def run(recipe: Recipe, **options: Any) -> list[dict[str, Any]]:
    def call() -> None:
        directory = RunDirectory(recipe.run.output_dir)
        with build_reporter(recipe, rank=0, run_directory=directory) as reporter:
            train(recipe, process=ProcessSpec(rank=0, world_size=1), reporter=reporter, **options)

    run_ranks(call, 1)
    lines = (recipe.run.output_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def collapsed_checkpoint(source: Path, folder: Path) -> Path:
    """Return a copy whose tokens look alike to its routers: one channel drowns the others."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    weights["model.embed_tokens.weight"][:, 0] = 300.0
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.mark.ranks
@pytest.mark.parametrize("guard", ["true", "false"])
def test_e13_a_run_whose_routers_collapsed_goes_on_and_counts_them(
    recipe: Recipes,
    workspace: Path,
    tmp_path: Path,
    guard: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = collapsed_checkpoint(workspace / "model", tmp_path / "model")
    steps = run(recipe(model__path=str(model), replay__guard=guard, **LONG))
    assert len(steps) == 2
    assert steps[0]["replay/collapsed_layers"] == 3
    assert steps[0]["replay/agreement"] > 0.99
    told = capfd.readouterr().out
    assert told.count("warning: layers [0, 1, 2] send every token to the same experts") == 1
    assert "optimizer.lr = 0.001" in told.replace("\n", " ")


@pytest.mark.ranks
def test_r7_a_policy_that_its_learning_rate_ruined_is_named_for_what_it_is(recipe: Recipes) -> None:
    with pytest.raises(
        DivergedError, match=r"Training has diverged. Lower optimizer.lr \(it is 1000"
    ):
        run(recipe(**LONG | {"run__max_steps": 3, "optimizer__lr": 1e3}))


def with_constant_layer(trace: RoutingTrace) -> RoutingTrace:
    ids = trace.expert_ids.copy()
    ids[:, 1] = [4, 1, 7, 2]
    return replace(trace, expert_ids=ids)


class UnwrittenLayer:
    """The embedded engine, one layer of whose routes nobody wrote."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.inner = recipe_engine(recipe, device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def generate(self, requests: Any, sampling: Any) -> Any:
        return [
            replace(
                group,
                completions=tuple(
                    replace(c, trace=with_constant_layer(c.trace)) for c in group.completions
                ),
            )
            for group in self.inner.generate(requests, sampling)
        ]


@pytest.mark.ranks
def test_e13_control_a_layer_that_the_engine_did_not_capture_is_refused_before_it_teaches(
    recipe: Recipes,
) -> None:
    with pytest.raises(
        MisalignmentError,
        match=r"(?s)step 1, update 1 of 1: .*layer 1: .*did not capture this layer",
    ):
        run(recipe(**LONG), make_engine=UnwrittenLayer)


@pytest.mark.ranks
def test_e13_without_the_guard_nothing_is_compared(recipe: Recipes) -> None:
    steps = run(recipe(replay__guard="false", **LONG), make_engine=UnwrittenLayer)
    assert steps[0]["replay/agreement_min_layer"] < 0.5
    assert steps[0]["replay/collapsed_layers"] == 0


def live_sets(num_rows: int, tokens: int, *, stray: int = 0) -> dict[str, Any]:
    use = RouteUse(
        layers=(3, 8),
        num_rows=num_rows,
        favourite=np.array([[2, 5, 9], [1, 4, 11]]),
        favourite_times=np.array([num_rows - stray, 2]),
    )
    sets = LiveSets()
    sets.add(use, np.arange(num_rows) % tokens)
    return sets.to_plain()


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([live_sets(40, 20)], [3]),
        ([live_sets(20, 20), live_sets(20, 20)], [3]),
        ([live_sets(400, 20, stray=4)], [3]),
        ([live_sets(400, 20, stray=5)], []),
        ([live_sets(31, 20)], []),
        ([live_sets(40, 7)], []),
        ([], []),
    ],
)
def test_e13_a_layer_has_collapsed_when_nearly_all_of_enough_rows_choose_one_set(parts, expected):
    assert LiveSets.collapsed(parts) == expected
