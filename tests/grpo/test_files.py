"""A step trained again from completions on disk takes the very step that was trained live."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moe_replay.errors import EngineError, RecipeError
from moe_replay.recipe.recipe import Recipe
from moe_replay.testing.ranks import run_ranks

from ..support.rollouts import roll_out
from . import smallest_recipe
from .test_loop import run

Recipes = Callable[..., Recipe]


def written(workspace: Path, folder: Path, *options: str, **count: int) -> Path:
    """Run `moe-replay rollout` in a process of its own and return its folder."""
    overrides = [("rollout.dtype", "float32")]
    overrides += [(key, value) for key, _, value in (option.partition("=") for option in options)]

    def call() -> None:
        assert roll_out(workspace / "recipe.toml", folder, overrides, **count) == 0

    run_ranks(call, 1)
    return folder


@pytest.mark.ranks
def test_a_step_from_files_is_the_step_that_was_trained_live(
    recipe: Recipes, workspace: Path, tmp_path: Path
) -> None:
    live = run(recipe(rollout__dtype="float32", run__max_steps=1))
    from_files = {"rollout__engine": "files", "run__max_steps": 1}
    right = written(workspace, tmp_path / "right")
    assert run(recipe(**from_files, rollout__path=right), restart=True) == live
    # Live, two ranks sample in batches of their own; from files they share what was sampled in one.
    shared = run(recipe(**from_files, rollout__path=right), world_size=2, restart=True)
    assert shared[0]["reward"] == live[0]["reward"]
    assert shared[0]["grad_norm"] == pytest.approx(live[0]["grad_norm"], rel=1e-5)
    coarse = written(workspace, tmp_path / "coarse", "rollout.dtype=bfloat16")
    other = run(recipe(**from_files, rollout__path=coarse), restart=True)
    assert other[0]["grad_norm"] != live[0]["grad_norm"]


@pytest.mark.ranks
def test_a_second_step_needs_files_of_its_own_policy(
    recipe: Recipes, workspace: Path, tmp_path: Path
) -> None:
    folder = written(workspace, tmp_path / "files", num_prompts=8)
    keys = {"rollout__engine": "files", "rollout__path": folder, "run__max_steps": 2}
    with pytest.raises(EngineError, match="allow_stale"):
        run(recipe(**keys))
    records = run(recipe(**keys, rollout__allow_stale="true"), restart=True)
    assert [record["policy_version"] for record in records] == [1, 2]
    with pytest.raises(EngineError, match="run out"):
        run(recipe(**{**keys, "run__max_steps": 3}, rollout__allow_stale="true"))


def test_files_must_be_named() -> None:
    assert "rollout.path" in smallest_recipe.problems_of(rollout={"engine": "files"})
    named = {"engine": "files", "path": "rollouts"}
    smallest_recipe.recipe(rollout=named)
    evaluated = smallest_recipe.problems_of(rollout=named, data={"eval": "/data/eval.jsonl"})
    assert "data.eval" in evaluated and "training prompts only" in evaluated


def test_files_are_not_sampled_from_again(workspace: Path, tmp_path: Path) -> None:
    overrides = [("rollout.engine", "files"), ("rollout.path", str(tmp_path))]
    with pytest.raises(RecipeError, match="samples nothing"):
        roll_out(workspace / "recipe.toml", tmp_path, overrides)


@pytest.mark.parametrize("count", [0, -3])
def test_at_least_one_prompt_is_sampled(count: int, workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="at least 1"):
        roll_out(workspace / "recipe.toml", tmp_path, num_prompts=count)
