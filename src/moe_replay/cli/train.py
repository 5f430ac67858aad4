"""`moe-replay train`: check everything that can be checked cheaply, show the recipe, then run the loop.

In: a recipe path and overrides. Out: an exit code. Called by: cli.main.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import closing

from moe_replay.cli.environment import read_process, set_defaults
from moe_replay.errors import RecipeError
from moe_replay.grpo.config import ProcessSpec, Recipe
from moe_replay.grpo.recipe_file import load_recipe
from moe_replay.rollout.bearer import exposure


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
    process = read_process(os.environ)
    set_defaults(os.environ)
    recipe = load_recipe(recipe_path, with_values(overrides))
    recipe.check_world(process.world_size)
    notes = _check_inputs(recipe)
    if process.rank == 0:
        print(recipe.resolved_toml(), flush=True)
        for note in notes:
            print(note, file=sys.stderr)
    if dry_run:
        if process.rank == 0:
            print(
                "dry run: the recipe and everything that it points to are in order", file=sys.stderr
            )
        return 0
    _train(recipe, process, restart=restart)
    return 0


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


def _check_inputs(recipe: Recipe) -> list[str]:
    """Open everything that the recipe points to except the weights; return what is worth knowing about it."""
    from moe_replay.grpo.inputs import open_inputs

    with closing(open_inputs(recipe)) as inputs:
        # Loads Megatron-Core, which takes seconds: after everything that fails sooner.
        from moe_replay.megatron.model import read_model_shape

        read_model_shape(recipe.model.path)
    warning = exposure(recipe.rollout.token_file)
    notes = [] if warning is None else [warning]
    for key, source in (("data.train", inputs.train), ("data.eval", inputs.held_out)):
        if source is not None and source.num_deleted:
            notes.append(
                f"{key}: {source.num_deleted} prompts are longer than data.max_prompt_length = "
                f"{recipe.data.max_prompt_length} tokens and were left out"
            )
    return notes


def _train(recipe: Recipe, process: ProcessSpec, *, restart: bool) -> None:
    from transformers.utils.logging import disable_progress_bar

    from moe_replay.grpo.loop import train
    from moe_replay.report import RunDirectory, build_reporter

    # Its bars would be drawn across the run's own display.
    disable_progress_bar()

    directory = RunDirectory(recipe.run.output_dir)
    with build_reporter(recipe, rank=process.rank, run_directory=directory) as reporter:
        train(recipe, process=process, reporter=reporter, restart=restart)
