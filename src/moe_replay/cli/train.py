"""`moe-replay train` and `moe_replay.train`: check everything that can be checked cheaply, then run the loop.

In: a recipe and overrides. Out: an exit code, or the run directory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_replay.cli.environment import read_process, set_defaults
from moe_replay.cli.stages import Progress, quiet_transformers, say
from moe_replay.errors import RecipeError
from moe_replay.grpo.config import ProcessSpec, Recipe
from moe_replay.grpo.recipe_file import load_recipe
from moe_replay.rollout.bearer import exposure

if TYPE_CHECKING:
    from moe_replay.grpo.inputs import Inputs
    from moe_replay.report import RunDirectory


def run_train(
    recipe_path: str,
    overrides: Sequence[tuple[str, str | None]],
    *,
    dry_run: bool,
    restart: bool,
) -> int:
    """Check a recipe and, unless ``dry_run``, train by it.

    Raises:
        MoeReplayError: of the kind that names what went wrong.
    """
    recipe, process, inputs = _prepare(recipe_path, with_values(overrides))
    if not dry_run:
        _train(recipe, process, restart=restart)
    elif process.rank == 0:
        print(recipe.resolved_toml(), flush=True)
        (prompt,) = inputs.train.at(0, 1)
        say(f"first training prompt, {len(prompt.prompt_ids)} tokens:\n{prompt.text}")
        say("dry run: the recipe and everything that it points to are in order")
    return 0


def train_recipe(
    recipe: Path | str | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    *,
    restart: bool = False,
) -> RunDirectory:
    """Train by a recipe from Python, as `moe-replay train` does, and return its run directory.

    ``recipe`` is a TOML file, or its tables as a dictionary; ``overrides`` maps dotted keys to values. A run whose output
    directory holds checkpoints is resumed, unless ``restart`` discards them. Call it before anything else imports
    torch: it sets what torch reads from the environment while it loads, where that is unset.

    Example:
        >>> run = moe_replay.train("recipe.toml", {"run.max_steps": 5})
        >>> run.read_steps()[-1].metrics["reward"]
        0.5625

    Raises:
        MoeReplayError: of the kind that names what went wrong.
    """
    loaded, process, _ = _prepare(recipe, overrides or {})
    return _train(loaded, process, restart=restart)


def _prepare(
    source: Path | str | Mapping[str, Any], overrides: Sequence[tuple[str, str]] | Mapping[str, Any]
) -> tuple[Recipe, ProcessSpec, Inputs]:
    """Load a recipe and check everything but the weights, saying what begins and what is worth knowing."""
    process = read_process(os.environ)
    set_defaults(os.environ)
    recipe = load_recipe(source, overrides)
    recipe.check_world(process.world_size)
    say("loading tokenizer, data and rewards ...")
    from moe_replay.grpo.inputs import open_inputs

    with closing(open_inputs(recipe, Progress())) as inputs:
        say("loading torch and Megatron-Core ...")
        # Takes seconds: after everything that fails sooner.
        from moe_replay.megatron.model import read_model_shape

        read_model_shape(recipe.model.path)
        for note in _notes(recipe, inputs):
            say(note)
    return recipe, process, inputs


def with_values(overrides: Sequence[tuple[str, str | None]]) -> list[tuple[str, str]]:
    """Return the overrides, each with its value.

    Raises:
        RecipeError: one has none.
    """
    pairs: list[tuple[str, str]] = []
    for key, value in overrides:
        if value is None:
            raise RecipeError(
                f"--{key} has no value: write --{key} VALUE (true or false for a switch)"
            )
        pairs.append((key, value))
    return pairs


def _notes(recipe: Recipe, inputs: Inputs) -> list[str]:
    """Return what is worth knowing about what a recipe points to."""
    warning = exposure(recipe.rollout.token_file)
    notes = [*inputs.notes] if warning is None else [*inputs.notes, warning]
    return notes


def _train(recipe: Recipe, process: ProcessSpec, *, restart: bool) -> RunDirectory:
    from moe_replay.grpo.loop import train
    from moe_replay.report import RunDirectory, build_reporter

    quiet_transformers()
    directory = RunDirectory(recipe.run.output_dir)
    with build_reporter(recipe, rank=process.rank, run_directory=directory) as reporter:
        train(recipe, process=process, reporter=reporter, restart=restart)
    return directory
