"""RunView: what a run directory says of its run, whether it ended, was killed or is still going."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from moe_replay.errors import RunDirectoryError
from moe_replay.grpo.records import (
    END_FILE,
    FAILURE_FILE,
    EvalRecord,
    RunEnd,
    RunFailure,
    StepRecord,
)
from moe_replay.report.run_directory import RunDirectory

_T = TypeVar("_T", RunEnd, RunFailure)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """One run as the page shows it."""

    number: int
    """Place among the runs of the page, from 0; decides its colour."""
    name: str
    """Last parts of its path, as many as tell it from the other runs."""
    directory: RunDirectory
    """Where it lies, and what reads its completions."""
    recipe: Mapping[str, Any]
    """Dotted key -> value, of ``recipe.toml``."""
    versions: Mapping[str, Any]
    """Package -> version; empty where the file is missing."""
    steps: tuple[StepRecord, ...]
    """Finished steps, in order."""
    evaluations: tuple[EvalRecord, ...]
    """In order."""
    end: RunEnd | None
    """How it ended; None while it runs, and after a kill or an error."""
    failure: RunFailure | None
    """The error that ended it."""

    @property
    def mode(self) -> str:
        """Its ``router_replay_mode``."""
        return str(self.recipe.get("replay.router_replay_mode", "unknown"))

    @property
    def max_steps(self) -> int | None:
        """Steps from start to end."""
        return self.recipe.get("run.max_steps")


def open_runs(paths: Sequence[Path | str]) -> list[RunView]:
    """Read run directories, in the order given.

    Raises:
        RunDirectoryError: a path is not a run directory, is given twice, or holds a file that
            cannot be read.
        CheckpointError: a line in the middle of a record file is damaged.
    """
    folders = [Path(path).absolute() for path in paths]
    for folder in folders:
        if folders.count(folder) > 1:
            raise RunDirectoryError(
                f"{folder} is given {folders.count(folder)} times; name it once"
            )
        _check(folder)
    return [
        _view(number, name, folder)
        for number, (name, folder) in enumerate(zip(_names(folders), folders, strict=True))
    ]


def _check(folder: Path) -> None:
    expected = "expected the run.output_dir of a run, a folder with recipe.toml and metrics.jsonl"
    if not folder.exists():
        raise RunDirectoryError(f"{folder} does not exist; {expected}")
    if not folder.is_dir():
        near = f": its folder {folder.parent} is one" if _is_run(folder.parent) else ""
        raise RunDirectoryError(f"{folder} is a file, {expected}{near}")
    if not _is_run(folder):
        below = sorted(path.name for path in folder.iterdir() if _is_run(path))
        hint = f"; it holds runs, name them: {', '.join(below[:8])}" if below else ""
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise RunDirectoryError(f"{folder} holds {held}, {expected}{hint}")


def _is_run(folder: Path) -> bool:
    return (folder / "recipe.toml").is_file()


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that are all different.

    Examples:
        >>> _names([Path("/runs/a/R3"), Path("/runs/b/R3")])
        ['a/R3', 'b/R3']
    """
    longest = max(len(folder.parts) for folder in folders)
    for count in range(1, longest + 1):
        names = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _view(number: int, name: str, folder: Path) -> RunView:
    directory = RunDirectory(folder)
    versions = folder / "versions.json"
    return RunView(
        number=number,
        name=name,
        directory=directory,
        recipe=_recipe(folder / "recipe.toml"),
        versions=_json(versions) if versions.exists() else {},
        steps=tuple(directory.read_steps()),
        evaluations=tuple(directory.read_evaluations()),
        end=_record(folder / END_FILE, RunEnd),
        failure=_record(folder / FAILURE_FILE, RunFailure),
    )


def _recipe(file: Path) -> dict[str, Any]:
    try:
        return flattened(tomllib.loads(file.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RunDirectoryError(
            f"{file} is not TOML ({error}); a run writes it at its start, so something else changed "
            "it: restore it, or start the run again, which writes it once more"
        ) from error


def flattened(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> value of nested tables; lists of tables stay values.

    Examples:
        >>> flattened({"run": {"seed": 0}})
        {'run.seed': 0}
    """
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            found |= flattened(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _json(file: Path) -> dict[str, Any]:
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunDirectoryError(
            f"{file} is not JSON ({error}); remove it, the page says then that it is missing"
        ) from error
    if not isinstance(held, dict):
        raise RunDirectoryError(f"{file} holds {type(held).__name__}, expected a JSON object")
    return held


def _record(file: Path, kind: type[_T]) -> _T | None:
    if not file.exists():
        return None
    held = _json(file)
    names = kind.__dataclass_fields__.keys()
    missing = names - held.keys()
    if missing:
        raise RunDirectoryError(
            f"{file} lacks {', '.join(sorted(missing))}; remove it, it only says how the run ended"
        )
    return kind(**{name: held[name] for name in names})
