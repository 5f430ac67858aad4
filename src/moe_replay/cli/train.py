"""`moe-replay train` and `moe_replay.train`: do all cheap checks, then run the loop."""

from __future__ import annotations

import argparse
import os
import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_replay.cli.environment import read_process, set_defaults
from moe_replay.cli.stages import START_AGAIN, Progress, quiet_transformers, say
from moe_replay.grpo.records import RunEnd, report_command
from moe_replay.grpo.start.preflight import Preflight, preflight
from moe_replay.grpo.stopping import StopRequest, StopRequested
from moe_replay.recipe.bearer import exposure
from moe_replay.recipe.load import load_recipe
from moe_replay.recipe.sections.rollout import ServersEngineSection

if TYPE_CHECKING:
    from moe_replay.report import RunDirectory

_MAX_GOODBYE_S = 30.0


def run_train(options: argparse.Namespace) -> int:
    """Check a recipe and, unless ``--dry-run`` is given, train by it.

    Raises:
        MoeReplayError: of the kind that names what went wrong.
    """
    stop = StopRequest()
    kept = {"restart": options.restart, "allow_changed": options.allow_changed}
    launched = read_process(os.environ).launched_by_torchrun
    try:
        with stop.listening(forwards=launched, say=say), ExitStack() as stack:
            with stop.breaking_off():
                checked = _prepare(
                    options.recipe,
                    options.overrides,
                    tries_push=options.dry_run,
                    elsewhere=options.elsewhere,
                )
            stack.callback(checked.close)
            if options.dry_run:
                if not options.elsewhere:
                    _check_directory(checked, **kept)
                _show(checked)
                return 0
            _, end = _train(checked, **kept, stop=stop)
    except StopRequested:
        say(f"stopped by {stop.reason} before the run began: the same command starts it again")
        return _exit_code(stop.reason)
    if end.stopped_by is not None:
        say(_farewell(end, checked.recipe.run.output_dir))
        _end_within(_MAX_GOODBYE_S, _exit_code(end.stopped_by))
    return _exit_code(end.stopped_by)


def _check_directory(checked: Preflight, *, restart: bool, allow_changed: Collection[str]) -> None:
    """Raise `CheckpointError` if the contents of the run directory would prevent a start."""
    if checked.process.rank == 0:
        from moe_replay.grpo.start.admission import check_admission
        from moe_replay.megatron.checkpoint import CheckpointFolder

        recipe = checked.recipe
        folder = CheckpointFolder(
            recipe.run.output_dir / "checkpoints",
            save_total_limit=recipe.checkpoint.save_total_limit,
        )
        check_admission(recipe, folder, restart=restart, allow_changed=allow_changed)


def _show(checked: Preflight) -> None:
    """Print the result of a dry run."""
    if checked.process.rank == 0:
        assert checked.inputs is not None
        print(checked.recipe.resolved_toml(), flush=True)
        (prompt,) = checked.inputs.train.at(0, 1)
        say(f"first training prompt, {len(prompt.prompt_ids)} tokens:\n{prompt.text}")
        for text in checked.unanswered:
            say(f"left to the machine that trains: {text}")
        say("dry run: the recipe and everything it points to are in order")


def train_recipe(
    recipe: Path | str | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    *,
    restart: bool = False,
    allow_changed: Collection[str] = (),
    stop: StopRequest | None = None,
) -> RunDirectory:
    """Train by a recipe from Python, as `moe-replay train` does, and return its run directory.

    ``recipe`` is a TOML file, or its tables as a dictionary; ``overrides`` maps dotted keys to
    values. A run whose output directory holds checkpoints is resumed, unless ``restart`` discards
    them; ``allow_changed`` names keys that may have changed since. ``stop`` lets another thread end
    it early, with a checkpoint. Call it before anything else imports torch: it sets unset
    environment variables that torch reads on import.

    Examples:
        >>> run = moe_replay.train("recipe.toml", {"run.max_steps": 5})
        >>> run.read_steps()[-1].metrics["reward"]
        0.5625

    Raises:
        MoeReplayError: of the kind that names what went wrong.
    """
    with closing(_prepare(recipe, overrides or {})) as checked:
        directory, _ = _train(
            checked,
            restart=restart,
            allow_changed=allow_changed,
            stop=StopRequest() if stop is None else stop,
        )
    return directory


def _prepare(
    source: Path | str | Mapping[str, Any],
    overrides: Sequence[tuple[str, str]] | Mapping[str, Any],
    *,
    tries_push: bool = False,
    elsewhere: bool = False,
) -> Preflight:
    """Load a recipe, check that it can start, and print progress and notes.

    Raises:
        MoeReplayError: the first reason why it cannot start.
    """
    process = read_process(os.environ)
    set_defaults(os.environ)
    recipe = load_recipe(source, overrides)
    checked = preflight(
        recipe,
        process,
        any_ranks=elsewhere and not process.launched_by_torchrun,
        tries_push=tries_push,
        elsewhere=elsewhere,
        announce=say,
        progress=Progress(),
    )
    checked.refuse()
    for note in _notes(checked):
        say(note)
    return checked


def _exit_code(stopped_by: str | None) -> int:
    """Return 0 for a finished run, 130 after Ctrl-C, else the code that asks for a restart."""
    return 0 if stopped_by is None else 130 if stopped_by == "SIGINT" else START_AGAIN


def _farewell(end: RunEnd, directory: Path) -> str:
    if end.step == 0:
        return (
            f"stopped by {end.stopped_by} before the first of {end.max_steps} steps finished, so there is no checkpoint: "
            "the same command starts from the beginning"
        )
    return (
        f"stopped by {end.stopped_by} after step {end.step} of {end.max_steps}, which is saved: the same command continues "
        f"from there\nlook at the run so far: {report_command(directory)}"
    )


def _end_within(seconds: float, code: int) -> None:
    """End the process after some seconds, even if engine threads still wait for a server."""
    timer = threading.Timer(seconds, os._exit, [code])
    timer.daemon = True
    timer.start()


def _notes(checked: Preflight) -> list[str]:
    """Return notes about the files that a recipe points to."""
    assert checked.inputs is not None
    notes = [*checked.inputs.notes, *checked.notes]
    rollout = checked.recipe.rollout
    if isinstance(rollout, ServersEngineSection) and (warning := exposure(rollout.token_file)):
        notes.append(warning)
    return notes


def _train(
    checked: Preflight,
    *,
    restart: bool,
    allow_changed: Collection[str],
    stop: StopRequest,
) -> tuple[RunDirectory, RunEnd]:
    from moe_replay.grpo.loop import train
    from moe_replay.report import RunDirectory, build_reporter

    quiet_transformers()
    recipe, process = checked.recipe, checked.process
    directory = RunDirectory(recipe.run.output_dir)
    with build_reporter(recipe, rank=process.rank, run_directory=directory) as reporter:
        end = train(
            recipe,
            process=process,
            reporter=reporter,
            restart=restart,
            allow_changed=allow_changed,
            stop=stop,
            checked=checked,
        )
    return directory, end
