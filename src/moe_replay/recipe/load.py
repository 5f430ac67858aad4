"""From a TOML file and dotted overrides to a `Recipe`, with every problem of a recipe reported at once.

In: a path or nested tables, dotted overrides. Out: `Recipe`.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from moe_replay.errors import RecipeError, UnsupportedError
from moe_replay.recipe.bearer import without_secrets
from moe_replay.recipe.keys import SECTIONS, choices_of, nearest
from moe_replay.recipe.recipe import Recipe
from moe_replay.recipe.rules import GENERATED, Problem, effect_free_keys, rule_problems
from moe_replay.recipe.sections import RewardSection, Section
from moe_replay.tasks.datasets.files import HUB

_PATHS = (
    "run.output_dir",
    "model.path",
    "data.cache_dir",
    "rollout.token_file",
    "rollout.ca_file",
    "rollout.path",
    "rollout.weights_dir",
)


def load_recipe(
    source: Path | str | Mapping[str, Any],
    overrides: Sequence[tuple[str, str]] | Mapping[str, Any] = (),
) -> Recipe:
    """Read a recipe, apply dotted overrides, and check all of it.

    ``source`` is a TOML file, or nested tables. ``overrides`` holds pairs such as ``("grpo.beta", "0.1")`` or
    ``("rewards.0.weight", "2")``, where each text is read as a TOML value, or taken as a string where it is not one;
    or a mapping such as ``{"grpo.beta": 0.1}``, whose values are taken as they are. Relative paths in a file start at the
    file's folder, all others at the working directory.

    Raises:
        RecipeError: the file cannot be read, or anything in it is wrong; the message lists every problem found.
        UnsupportedError: all that is wrong is that something cannot be honoured.
    """
    if isinstance(source, Mapping):
        table, folder, where = _plain(source), Path.cwd(), "recipe"
    else:
        path = Path(source).expanduser().absolute()
        table, folder, where = _read_toml(path), path.parent, f"recipe {path}"
    _make_paths_absolute(table, folder)
    if isinstance(overrides, Mapping):
        pairs = [(key, _plain(value)) for key, value in overrides.items()]
    else:
        pairs = [(key, _parse(text)) for key, text in overrides]
    for key, value in pairs:
        _override(table, key, value)
    return recipe_from_table(table, where=where)


def recipe_from_table(table: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
    """Check nested tables, whose paths are absolute already, and make a `Recipe` of them.

    Raises:
        RecipeError: as `load_recipe`.
    """
    sections, problems = _validate_sections(table)
    problems += rule_problems(sections)
    effect_free = effect_free_keys(sections)
    for key, value in _set_keys(table):
        if key in effect_free:
            problems.append(
                Problem(
                    path=key,
                    text=f"set to {value!r}, but it has no effect: {effect_free[key]}. Remove it, or change that",
                )
            )
    if problems:
        raise _error(problems, where)
    return Recipe(**sections)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(
            f"recipe {path} does not exist: check the path (the working directory is {Path.cwd()})"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(
            f"recipe {path} is not valid TOML: {error}. Texts need quotes, and booleans are true and false"
        ) from error


def _make_paths_absolute(table: dict[str, Any], folder: Path) -> None:
    for section, values in table.items():
        entries = values if isinstance(values, list) else [values]
        for entry in entries:
            if isinstance(entry, dict):
                for key, value in entry.items():
                    entry[key] = _absolute(f"{section}.{key}", value, folder)


def _absolute(path: str, value: Any, folder: Path) -> Any:
    """Anchor a value at a folder if its key holds a path; return any other value as it is."""
    if not isinstance(value, str):
        return value
    if path in _PATHS:
        return _anchored(value, folder)
    if path in ("data.train", "data.eval") and not value.startswith((GENERATED, HUB)):
        return _anchored(value, folder)
    place, _, function = value.rpartition(":")
    if path == "rewards.function":
        file = place if place.endswith(".py") else _module_file(place, folder)
        return f"{_anchored(file, folder)}:{function}" if file else value
    return value


def _module_file(module: str, folder: Path) -> str | None:
    """Return the file of a module that lies in ``folder``, relative to it; None for one that is installed elsewhere."""
    parts = module.split(".")
    if not all(part.isidentifier() for part in parts):
        return None
    for file in (Path(*parts).with_suffix(".py"), Path(*parts) / "__init__.py"):
        if (folder / file).is_file():
            return str(file)
    return None


def _anchored(path: str, folder: Path) -> str:
    # Without normpath the summary would show recipes/demo/../../runs/demo; links are kept as they are.
    return os.path.normpath(folder / Path(path).expanduser())


def _plain(value: Any) -> Any:
    """Return a copy of a Python value in the types that TOML has."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def _override(table: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    target: Any = table
    for depth, part in enumerate(parents):
        if isinstance(target, list):
            target = target[_entry_number(target, part, path)]
        else:
            target = target.setdefault(part, {})
        if not isinstance(target, dict | list):
            raise RecipeError(
                f"--{path} {value}: {'.'.join(parents[: depth + 1])} is the value {target!r}, not a table: "
                "override the value itself"
            )
    value = _absolute(
        ".".join(part for part in path.split(".") if not part.isdigit()), value, Path.cwd()
    )
    if isinstance(target, list):
        target[_entry_number(target, last, path)] = value
    else:
        target[last] = value


def _entry_number(entries: list[Any], part: str, path: str) -> int:
    if not part.isdigit() or int(part) >= len(entries):
        raise RecipeError(
            f"--{path}: {part!r} names no entry of a list of {len(entries)}, whose entries are numbered from 0: "
            "override an existing entry, or add one in the recipe"
        )
    return int(part)


def _parse(text: str) -> Any:
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return table["value"] if set(table) == {"value"} else text


def _validate_sections(table: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Return the sections that are valid by themselves, and what is wrong with the others."""
    problems = [
        Problem(
            path=name,
            text=f"set to {table[name]!r}, but there is no such section or key; {nearest(name)}",
        )
        for name in table
        if name not in SECTIONS
    ]
    sections: dict[str, Any] = {}
    for name, section in SECTIONS.items():
        if name == "rewards":
            entries, found = _validate_rewards(table.get("rewards", []))
        else:
            entries, found = _validate(section, table.get(name, {}), name)
        problems += found
        if not found:
            sections[name] = entries
    return sections, problems


def _validate_rewards(entries: Any) -> tuple[tuple[Any, ...], list[Problem]]:
    if not isinstance(entries, list) or not entries:
        return (), [
            Problem(
                path="rewards",
                text=f"got {entries!r}, expected at least one [[rewards]] table, such as "
                '[[rewards]] with function = "exact_match"',
            )
        ]
    validated = [_validate(RewardSection, entry, f"rewards.{n}") for n, entry in enumerate(entries)]
    return tuple(v for v, _ in validated), [problem for _, found in validated for problem in found]


def _validate(section: type[Section], table: Any, prefix: str) -> tuple[Any, list[Problem]]:
    if not isinstance(table, dict):
        return None, [
            Problem(
                path=prefix, text=f"got the value {table!r}, expected a table: write [{prefix}]"
            )
        ]
    try:
        return section.model_validate(table), []
    except ValidationError as error:
        return None, [_problem(section, prefix, details) for details in error.errors()]


def _problem(section: type[Section], prefix: str, details: ErrorDetails) -> Problem:
    path = ".".join([prefix, *map(str, details["loc"])])
    given = details["input"]
    field = section.model_fields.get(str(details["loc"][0]))
    description = (field.description or "").strip().replace("``", "") if field is not None else ""
    if details["type"] == "extra_forbidden":
        text = f"set to {given!r}, but there is no such key; {nearest(path)}"
    elif details["type"] == "missing":
        text = f"missing, and it has no default. It is: {description}"
    else:
        expected = details["msg"].removeprefix("Input should be ")
        text = f"got {given!r}, expected {expected}{_closest_choice(given, field)}. It is: {description}"
    return Problem(path=path, text=text)


def _closest_choice(given: Any, field: Any) -> str:
    close = difflib.get_close_matches(
        str(given), choices_of(field.annotation if field else None), n=1
    )
    return f" (nearest: {close[0]!r})" if close else ""


def _set_keys(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, section in table.items():
        if isinstance(section, dict):
            for key, value in section.items():
                yield f"{name}.{key}", value


def _error(problems: Sequence[Problem], where: str) -> RecipeError:
    lines = [f"  {problem.path}: {problem.text}" for problem in problems]
    number = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    message = without_secrets("\n".join([f"{where} has {number}:", *lines]))
    if all(problem.is_unsupported for problem in problems):
        return UnsupportedError(message)
    return RecipeError(message)
