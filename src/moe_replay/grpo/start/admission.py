"""Whether a run may start in its directory, decided by rank 0 before anything is loaded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moe_replay.errors import CheckpointError, MoeReplayError
from moe_replay.grpo.records import END_FILE, EXPORT_FOLDER, FAILURE_FILE, NEW_EXPORT
from moe_replay.grpo.start.digest_cache import DigestCache
from moe_replay.grpo.start.identity import Difference, differences, is_allowed, run_identity
from moe_replay.grpo.start.run_lock import LOCK_FILE, RunLock
from moe_replay.megatron.checkpoint import CheckpointFolder, RunPosition
from moe_replay.recipe.recipe import Recipe

CHANGES_FILE = "changes.jsonl"
"""Where accepted differences are kept: one line each, with the step from which they hold."""
_DIGESTS_FILE = "digests.json"
_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """What rank 0 found in the run directory."""

    step: int | None = None
    """Step of the checkpoint to resume from; None to start."""
    identity: Mapping[str, Any] = field(default_factory=dict)
    """What decides the results of the run, by content."""
    notes: tuple[str, ...] = ()
    """What a person should know about it."""
    refusal: str | None = None
    """Why the run may not start."""


def admit(
    recipe: Recipe,
    checkpoints: CheckpointFolder,
    closing: ExitStack,
    *,
    restart: bool,
    allow_changed: Collection[str],
) -> Admission:
    """Lock the run directory until ``closing`` ends; compare its newest checkpoint with the recipe.

    Leftovers of killed writers are removed. Differences in the keys ``allow_changed``, and below
    them, are accepted and written down.
    """
    directory = recipe.run.output_dir
    try:
        _check_can_be_written(directory)
        lock = RunLock(directory)
        closing.callback(lock.release)
        notes = [] if lock.note is None else [lock.note]
        checkpoints.remove_unfinished()
        for name in (NEW_EXPORT, f"{NEW_EXPORT}.partial"):
            shutil.rmtree(directory / name, ignore_errors=True)
        if restart:
            for folder in directory.glob(f"{EXPORT_FOLDER}-*"):
                shutil.rmtree(folder)
        for name in (END_FILE, FAILURE_FILE):
            (directory / name).unlink(missing_ok=True)
        cache = DigestCache(directory / _DIGESTS_FILE)
        identity = run_identity(recipe, cache)
        cache.save()
        steps = [] if restart else checkpoints.steps()
        if steps:
            position = checkpoints.position(steps[-1])
            changed = _accepted_changes(recipe, position, identity, allow_changed)
            if changed:
                _write_down(directory / CHANGES_FILE, position.step, changed)
            notes += [f"changed from step {position.step + 1} on: {change}" for change in changed]
    except (MoeReplayError, OSError) as error:
        # All ranks learn of it: one that raised alone would leave the others waiting.
        return Admission(refusal=str(error))
    return Admission(step=steps[-1] if steps else None, identity=identity, notes=tuple(notes))


def check_admission(
    recipe: Recipe, checkpoints: CheckpointFolder, *, restart: bool, allow_changed: Collection[str]
) -> None:
    """Raise what `admit` would refuse a start for, and keep nothing; for a dry run.

    Raises:
        CheckpointError: when the directory cannot be one, another process holds it, or its newest
            checkpoint is of another run.
        RecipeError: when a file that the recipe names cannot be read.
    """
    directory = recipe.run.output_dir
    _check_can_be_written(directory)
    if (directory / LOCK_FILE).exists():
        RunLock(directory).release()
    steps = [] if restart else checkpoints.steps()
    if steps:
        identity = run_identity(recipe, DigestCache(directory / _DIGESTS_FILE))
        _accepted_changes(recipe, checkpoints.position(steps[-1]), identity, allow_changed)


def _check_can_be_written(directory: Path) -> None:
    """Raise `CheckpointError` where no folder can be made or written; nothing is made."""
    nearest = next(path for path in (directory, *directory.parents) if path.exists())
    if not nearest.is_dir():
        raise CheckpointError(
            f"run.output_dir {directory} cannot be a folder: {nearest} is a file; choose another run.output_dir"
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"run.output_dir {directory} cannot be written: {nearest} is not writable for this user; choose another "
            "run.output_dir, or change its permissions"
        )


def _accepted_changes(
    recipe: Recipe,
    position: RunPosition,
    identity: Mapping[str, Any],
    allow_changed: Collection[str],
) -> list[Difference]:
    """Return what differs from a checkpoint.

    Raises:
        CheckpointError: when nobody has accepted some of it.
    """
    directory = recipe.run.output_dir
    changed = differences(position.identity, identity, recipe.fingerprint_defaults())
    refused = [change for change in changed if not is_allowed(change.key, allow_changed)]
    if not refused:
        return changed
    lines = [f"  {change}" for change in refused[:_SHOWN]]
    if len(refused) > _SHOWN:
        lines.append(f"  and {len(refused) - _SHOWN} more")
    # For a file its folder's key.
    keys = dict.fromkeys(change.key.partition("/")[0].partition(" ")[0] for change in refused)
    options = " ".join(f"--allow-changed {key}" for key in keys)
    raise CheckpointError(
        "\n".join(
            [
                f"{directory} holds step {position.step} of a run that trains differently from this one:",
                *lines,
                "To go on with the change, give the command this option, and the change is written down in "
                f"{CHANGES_FILE}: {options}",
                "To continue the run as it was, restore what has changed (recipe.toml in the run directory holds its recipe). "
                "For a run of its own, choose another run.output_dir, or pass --restart to discard this one",
            ]
        )
    )


def _write_down(path: Path, step: int, changed: list[Difference]) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    lines = [
        json.dumps({"after_step": step, "key": c.key, "old": c.old, "new": c.new, "accepted": now})
        for c in changed
    ]
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written ({error.strerror}), and a change that is not written down is not accepted; free some "
            "space and start again"
        ) from error
