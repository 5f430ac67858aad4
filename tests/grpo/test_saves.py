"""When checkpoints are due, by a clock that is set by hand; and runs that write them beside."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moe_replay.engines.types import Engine, Request, RolloutGroup, SamplingParams
from moe_replay.errors import CheckpointError
from moe_replay.grpo.engines import recipe_engine
from moe_replay.grpo.loop import train
from moe_replay.grpo.saves import SavePace
from moe_replay.grpo.stopping import StopRequest
from moe_replay.recipe.recipe import ProcessSpec, Recipe
from moe_replay.report import RunDirectory, build_reporter
from moe_replay.testing.ranks import run_ranks

from .test_loop import run

Recipes = Callable[..., Recipe]


def test_a_recipe_that_counts_steps_is_followed() -> None:
    pace = SavePace(3)
    pace.took(1e6, ended_at=0.0)
    assert [step for step in range(1, 10) if pace.is_due(step, now=0.0)] == [3, 6, 9]


def test_a_cheap_checkpoint_is_due_after_every_step() -> None:
    pace = SavePace(None)
    assert pace.is_due(1, now=0.0)
    pace.took(1.0, ended_at=5.0)
    assert pace.is_due(2, now=5.0)


@pytest.mark.parametrize(
    ("step_s", "save_s", "saved"),
    [
        (3, 9, [1, 61, 121]),
        (199, 10, [*range(1, 150, 2)]),
        (200, 10, [*range(1, 151)]),
        (3, 1, [*range(1, 151)]),
        # Due 22 s after the last one: after 8 steps of 3 s.
        (3, 1.1, [*range(1, 151, 8)]),
    ],
)
def test_saves_are_spread_by_what_they_take_beside_a_step(
    step_s: float, save_s: float, saved: list[int]
) -> None:
    """150 steps, all of one length, by hand: 9 s are due after 180 s, which is 60 steps of 3 s."""
    pace, now, found = SavePace(None), 0.0, []
    for step in range(1, 151):
        now += step_s
        if pace.is_due(step, now=now):
            found.append(step)
            now += save_s
            pace.took(save_s, ended_at=now)
    assert found == saved


def test_an_expensive_one_is_due_when_it_is_5_percent_of_the_time() -> None:
    pace = SavePace(None)
    pace.took(90.0, ended_at=1000.0)
    assert not pace.is_due(2, now=2799.0)
    assert pace.is_due(3, now=2800.0)
    # What takes 90 s every 1,890 s is 4.8 % of them.
    pace.took(90.0, ended_at=2890.0)
    assert not pace.is_due(4, now=4689.0)


def checkpoints_of(recipe: Recipe) -> list[str]:
    return sorted(path.name for path in (recipe.run.output_dir / "checkpoints").iterdir())


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_whose_checkpoints_are_written_beside_it_is_the_same(
    recipe: Recipes, tmp_path: Path, world_size: int
) -> None:
    """Stopped after two steps and resumed from what was written beside the second."""
    beside = {"checkpoint__asynchronous": "true", "run__output_dir": tmp_path / "beside"}
    plain = recipe(run__output_dir=tmp_path / "plain", run__max_steps=4)
    expected = run(plain, world_size=world_size)
    first = recipe(**beside, run__max_steps=2)
    run(first, world_size=world_size)
    assert checkpoints_of(first) == ["step-000001", "step-000002"]
    second = recipe(**beside, run__max_steps=4)
    assert run(second, world_size=world_size) == expected
    assert checkpoints_of(second) == ["step-000003", "step-000004"]
    ours, theirs = (
        load_file(each.run.output_dir / "export" / "model.safetensors") for each in (second, plain)
    )
    assert all(ours[name].equal(value) for name, value in theirs.items())


class Meddling:
    """An engine that does something else before one of its calls."""

    def __init__(self, engine: Engine, call: int, do: Callable[[], None]) -> None:
        self._engine, self._left, self._do = engine, call, do

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[RolloutGroup]:
        self._left -= 1
        if self._left == 0:
            self._do()
        return self._engine.generate(requests, sampling)


def train_meddled(recipe: Recipe, call: int, do: Callable[[], None], stop: StopRequest) -> Any:
    def make(recipe: Recipe, device: torch.device) -> Any:
        return Meddling(recipe_engine(recipe, device), call, do)

    files = build_reporter(recipe, rank=0, run_directory=RunDirectory(recipe.run.output_dir))
    with files as reporter:
        return train(recipe, process=ProcessSpec(), reporter=reporter, make_engine=make, stop=stop)


@pytest.mark.ranks
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_run_that_is_stopped_saves_and_waits_until_that_is_written(
    recipe: Recipes, asynchronous: str
) -> None:
    mine = recipe(checkpoint__asynchronous=asynchronous, checkpoint__save_steps=10)

    def stopped() -> int:
        stop = StopRequest()
        return train_meddled(mine, 3, lambda: stop.ask("SIGTERM"), stop).step

    assert run_ranks(stopped, 1) == [2]
    assert checkpoints_of(mine) == ["step-000002"]


@pytest.mark.ranks
def test_a_write_beside_the_run_that_fails_stops_it_and_costs_no_checkpoint(
    recipe: Recipes, tmp_path: Path
) -> None:
    """The folder of the second checkpoint is gone before its files are whole."""
    mine = recipe(checkpoint__asynchronous="true", run__max_steps=8)
    folder = mine.run.output_dir / "checkpoints"

    def remove() -> None:
        for path in folder.glob("unfinished-*"):
            shutil.rmtree(path)
            path.write_text("in the way")

    def fails() -> str:
        with pytest.raises(CheckpointError) as caught:
            train_meddled(mine, 3, remove, StopRequest())
        return str(caught.value)

    (message,) = run_ranks(fails, 1)
    assert "is the newest whole checkpoint" in message
    assert all(name.startswith(("step-", "unfinished-")) for name in checkpoints_of(mine))
    assert "step-000001" in checkpoints_of(mine)
