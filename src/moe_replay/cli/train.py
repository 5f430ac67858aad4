"""`moe-replay train` and `moe_replay.train`: check everything that can be checked cheaply, then run the loop.

In: a recipe and overrides. Out: an exit code, or the run directory.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_replay.cli.environment import read_process, set_defaults
from moe_replay.cli.stages import Progress, quiet_transformers, say
from moe_replay.errors import RecipeError
from moe_replay.grpo.config import ProcessSpec, Recipe
from moe_replay.grpo.recipe_file import load_recipe
from moe_replay.grpo.records import RunEnd
from moe_replay.grpo.stopping import StopRequest, StopRequested
from moe_replay.rollout.bearer import exposure

if TYPE_CHECKING:
    from moe_replay.grpo.inputs import Inputs
    from moe_replay.report import RunDirectory

RESUME = 75
"""Exit code of a run that was stopped and goes on when it is started again (EX_TEMPFAIL of sysexits.h)."""
_MAX_GOODBYE_S = 30.0


def run_train(
    recipe_path: str,
    overrides: Sequence[tuple[str, str | None]],
    *,
    dry_run: bool,
    restart: bool,
    allow_changed: Sequence[str] = (),
) -> int:
    """Check a recipe and, unless ``dry_run``, train by it.

    Raises:
        MoeReplayError: of the kind that names what went wrong.
    """
    stop = StopRequest()
    launched = read_process(os.environ).launched_by_torchrun
    try:
        with stop.listening(forwards=launched, say=say):
            with stop.breaking_off():
                recipe, process, inputs = _prepare(recipe_path, with_values(overrides))
            if dry_run:
                _show(recipe, process, inputs)
                return 0
            _, end = _train(
                recipe, process, restart=restart, allow_changed=allow_changed, stop=stop
            )
    except StopRequested:
        say(f"stopped by {stop.reason} before the run began: the same command starts it again")
        return _exit_code(stop.reason)
    if end.stopped_by is not None:
        say(_farewell(end))
        _end_within(_MAX_GOODBYE_S, _exit_code(end.stopped_by))
    return _exit_code(end.stopped_by)


def _show(recipe: Recipe, process: ProcessSpec, inputs: Inputs) -> None:
    """Show what a dry run has found."""
    if process.rank == 0:
        print(recipe.resolved_toml(), flush=True)
        (prompt,) = inputs.train.at(0, 1)
        say(f"first training prompt, {len(prompt.prompt_ids)} tokens:\n{prompt.text}")
        say("dry run: the recipe and everything that it points to are in order")


def train_recipe(
    recipe: Path | str | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    *,
    restart: bool = False,
    allow_changed: Collection[str] = (),
    stop: StopRequest | None = None,
) -> RunDirectory:
    """Train by a recipe from Python, as `moe-replay train` does, and return its run directory.

    ``recipe`` is a TOML file, or its tables as a dictionary; ``overrides`` maps dotted keys to values. A run whose output
    directory holds checkpoints is resumed, unless ``restart`` discards them; ``allow_changed`` names keys that may have changed
    since. ``stop`` lets another thread end it early and saved. Call it before anything else imports
    torch: it sets what torch reads from the environment while it loads, where that is unset.

    Example:
        >>> run = moe_replay.train("recipe.toml", {"run.max_steps": 5})
        >>> run.read_steps()[-1].metrics["reward"]
        0.5625

    Raises:
        MoeReplayError: of the kind that names what went wrong.
    """
    loaded, process, _ = _prepare(recipe, overrides or {})
    directory, _ = _train(
        loaded,
        process,
        restart=restart,
        allow_changed=allow_changed,
        stop=StopRequest() if stop is None else stop,
    )
    return directory


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


def _exit_code(stopped_by: str | None) -> int:
    """Return 0 for a run that is done, 130 for one that a person stopped, and else the code for "start me again"."""
    return 0 if stopped_by is None else 130 if stopped_by == "SIGINT" else RESUME


def _farewell(end: RunEnd) -> str:
    if end.step == 0:
        return (
            f"stopped by {end.stopped_by} before the first of {end.max_steps} steps was finished, so there is no checkpoint: "
            "the same command starts from the beginning"
        )
    return (
        f"stopped by {end.stopped_by} after step {end.step} of {end.max_steps}, which is saved: the same command goes on "
        "from there"
    )


def _end_within(seconds: float, code: int) -> None:
    """End the process after so many seconds even if threads of an engine still wait for a server."""
    timer = threading.Timer(seconds, os._exit, [code])
    timer.daemon = True
    timer.start()


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


def _train(
    recipe: Recipe,
    process: ProcessSpec,
    *,
    restart: bool,
    allow_changed: Collection[str],
    stop: StopRequest,
) -> tuple[RunDirectory, RunEnd]:
    from moe_replay.grpo.loop import train
    from moe_replay.report import RunDirectory, build_reporter

    quiet_transformers()
    directory = RunDirectory(recipe.run.output_dir)
    with build_reporter(recipe, rank=process.rank, run_directory=directory) as reporter:
        end = train(
            recipe,
            process=process,
            reporter=reporter,
            restart=restart,
            allow_changed=allow_changed,
            stop=stop,
        )
    return directory, end
