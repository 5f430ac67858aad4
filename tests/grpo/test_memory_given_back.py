"""Whole runs whose trainer gives memory back during rollouts are those that keep it, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from moe_replay.grpo.loop import train
from moe_replay.megatron.offload import DeviceMemory
from moe_replay.recipe.recipe import ProcessSpec, Recipe
from moe_replay.report import RunDirectory, build_reporter
from moe_replay.testing.ranks import run_ranks

from .test_loop import run

pytestmark = pytest.mark.ranks
Recipes = Callable[..., Recipe]
# An evaluation before the first step, a reference model, checkpoints while memory is away.
EVERYTHING: dict[str, Any] = {
    "data__eval": '"train.jsonl"',
    "data__eval_size": 3,
    "eval__every_steps": 1,
    "grpo__beta": 0.1,
    "run__max_steps": 3,
    "model__dtype": "bfloat16",
}


def exported(recipe: Recipe) -> dict[str, Any]:
    return load_file(recipe.run.output_dir / "export" / "model.safetensors")


def load(recipe: Recipes, workspace: Path, folder: Path, **overrides: Any) -> Recipe:
    values = EVERYTHING | {"data__eval": f'"{workspace / "train.jsonl"}"'} | overrides
    return recipe(run__output_dir=str(folder), **values)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_is_the_same_to_the_bit(
    recipe: Recipes, workspace: Path, tmp_path: Path, world_size: int
) -> None:
    kept = load(recipe, workspace, tmp_path / "kept", megatron__offload_during_rollout="none")
    moved = load(recipe, workspace, tmp_path / "moved", megatron__offload_during_rollout="weights")
    assert run(kept, world_size=world_size) == run(moved, world_size=world_size)
    ours, theirs = exported(moved), exported(kept)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(value) for name, value in theirs.items())


def test_a_resumed_run_may_give_back_what_it_kept_before(
    recipe: Recipes, workspace: Path, tmp_path: Path
) -> None:
    kept = load(recipe, workspace, tmp_path / "kept", megatron__offload_during_rollout="none")
    whole = run(kept)
    folder = tmp_path / "resumed"
    for steps, level in ((1, "none"), (2, "weights"), (3, "optimizer")):
        part = load(
            recipe,
            workspace,
            folder,
            run__max_steps=steps,
            megatron__offload_during_rollout=level,
        )
        resumed = run(part)
    assert [line for line in resumed if "loss" in line] == [
        line for line in whole if "loss" in line
    ]
    assert all(exported(part)[name].equal(value) for name, value in exported(kept).items())


def held_while_sampling(recipe: Recipe) -> list[int]:
    """Return the bytes that the trainer holds at each call of the engine."""
    from moe_replay.engines.embedded.engine import EmbeddedEngine
    from moe_replay.grpo.engines import recipe_engine

    held: list[int] = []
    memories: list[DeviceMemory] = []
    make, generate = DeviceMemory.__init__, EmbeddedEngine.generate

    def made(self: DeviceMemory, *args: Any, **named: Any) -> None:
        memories.append(self)
        make(self, *args, **named)

    def counted(self: EmbeddedEngine, *args: Any) -> Any:
        # The actor's first memory is that of a scorer, which it replaces.
        held.append(sum(memory.held_bytes() for memory in memories[1:]))
        return generate(self, *args)

    DeviceMemory.__init__, EmbeddedEngine.generate = made, counted
    with build_reporter(recipe, rank=0, run_directory=RunDirectory(recipe.run.output_dir)) as files:
        train(recipe, process=ProcessSpec(), reporter=files, make_engine=recipe_engine)
    return held


def test_the_engine_samples_in_the_room_that_the_level_names(
    recipe: Recipes, workspace: Path, tmp_path: Path
) -> None:
    held = {
        level: run_ranks(
            held_while_sampling,
            1,
            load(
                recipe,
                workspace,
                tmp_path / level,
                megatron__offload_during_rollout=level,
                run__max_steps=2,
            ),
        )[0]
        for level in ("none", "gradients", "optimizer", "weights")
    }
    # Two rollouts and three evaluations; the optimizer has no moments before its first step.
    assert all(len(sizes) == 5 for sizes in held.values())
    assert held["weights"] == [0] * 5
    # Two copies of the weights: the policy's and the reference model's.
    policy = held["optimizer"][0] / 2
    assert held["optimizer"] == [2 * policy] * 5
    # In units of bfloat16 weights: main weights 2, moments 4, gradients 2, buffers a bit padded.
    for level, (first, later) in {"gradients": (4, 8), "none": (6, 10)}.items():
        assert held[level][0] == pytest.approx(first * policy, rel=0.05)
        assert held[level][-1] == pytest.approx(later * policy, rel=0.05)
