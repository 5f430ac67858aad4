"""From a TOML file and dotted overrides to a `Recipe`, with every problem of a recipe reported at once.

In: a path, (dotted key, text) pairs of a command line. Out: `Recipe`, `RecipeKey` for documentation.
Called by: cli.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

from moe_replay.errors import RecipeError, UnsupportedError
from moe_replay.grpo.config import Recipe
from moe_replay.grpo.recipe_rules import GENERATED, Problem, effect_free_keys, rule_problems
from moe_replay.grpo.recipe_sections import RewardSection, Section


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeKey:
    """One key that a recipe may set, for help and documentation."""

    path: str
    """Dotted key; ``rewards.N.`` stands for any entry of the list."""
    default: str
    """TOML spelling of the default, ``required`` or ``none``."""
    text: str
    """What it does."""


_PATHS = (
    "run.output_dir",
    "model.path",
    "rollout.token_file",
    "rollout.path",
    "rollout.weights_dir",
)


def load_recipe(path: Path | str, overrides: Sequence[tuple[str, str]] = ()) -> Recipe:
    """Read a recipe, apply dotted overrides, and check all of it.

    ``overrides`` holds pairs such as ``("grpo.beta", "0.1")`` or ``("rewards.0.weight", "2")``: each text is read as
    a TOML value, or taken as a string where it is none. Relative paths in the file start at the file's folder,
    relative paths in overrides at the working directory.

    Raises:
        RecipeError: the file cannot be read, or anything in it is wrong; the message lists every problem found.
        UnsupportedError: all that is wrong is that something cannot be honoured.
    """
    path = Path(path).expanduser().absolute()
    table = _read_toml(path)
    _make_paths_absolute(table, path.parent)
    for key, text in overrides:
        _override(table, key, text)
    return recipe_from_table(table, where=f"recipe {path}")


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


def recipe_keys() -> Iterator[RecipeKey]:
    """Yield every key that a recipe may set, in the order of the sections."""
    for name, section in _SECTIONS.items():
        prefix = f"{name}.N" if name == "rewards" else name
        for key, field in section.model_fields.items():
            default = field.default
            if field.default_factory is not None:
                spelling = "{}"
            elif default is PydanticUndefined:
                spelling = _DERIVED_DEFAULTS.get((name, key), "required")
            elif default is None:
                spelling = "none"
            else:
                spelling = _spell(default)
            yield RecipeKey(
                path=f"{prefix}.{key}", default=spelling, text=(field.description or "").strip()
            )


def _section_types() -> dict[str, type[Section]]:
    sections: dict[str, type[Section]] = {"rewards": RewardSection}
    for name, field in Recipe.model_fields.items():
        if get_origin(field.annotation) is not tuple:
            assert isinstance(field.annotation, type) and issubclass(field.annotation, Section)
            sections[name] = field.annotation
    return {name: sections[name] for name in Recipe.model_fields}


_SECTIONS = _section_types()
_DERIVED_DEFAULTS = {
    ("rewards", "name"): "the function's name",
    ("grpo", "epsilon_high"): "epsilon",
}


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
    if path in ("data.train", "data.eval") and not value.startswith(GENERATED):
        return _anchored(value, folder)
    file, _, function = value.rpartition(":")
    if path == "rewards.function" and file.endswith(".py"):
        return f"{_anchored(file, folder)}:{function}"
    return value


def _anchored(path: str, folder: Path) -> str:
    # Without normpath the summary would show recipes/demo/../../runs/demo; links are kept as they are.
    return os.path.normpath(folder / Path(path).expanduser())


def _override(table: dict[str, Any], path: str, text: str) -> None:
    *parents, last = path.split(".")
    target: Any = table
    for depth, part in enumerate(parents):
        if isinstance(target, list):
            target = target[_entry_number(target, part, path)]
        else:
            target = target.setdefault(part, {})
        if not isinstance(target, dict | list):
            raise RecipeError(
                f"--{path} {text}: {'.'.join(parents[: depth + 1])} is the value {target!r}, not a table: "
                "override the value itself"
            )
    value = _absolute(
        ".".join(part for part in path.split(".") if not part.isdigit()), _parse(text), Path.cwd()
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


def _spell(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return str(list(value))
    return f'"{value}"' if isinstance(value, str) else str(value)


def _validate_sections(table: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Return the sections that are valid by themselves, and what is wrong with the others."""
    problems = [
        Problem(
            path=name,
            text=f"set to {table[name]!r}, but there is no such section or key; {_nearest(name)}",
        )
        for name in table
        if name not in _SECTIONS
    ]
    sections: dict[str, Any] = {}
    for name, section in _SECTIONS.items():
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
        text = f"set to {given!r}, but there is no such key; {_nearest(path)}"
    elif details["type"] == "missing":
        text = f"missing, and it has no default. It is: {description}"
    else:
        expected = details["msg"].removeprefix("Input should be ")
        text = f"got {given!r}, expected {expected}{_closest_choice(given, field)}. It is: {description}"
    return Problem(path=path, text=text)


def _closest_choice(given: Any, field: Any) -> str:
    choices = [
        choice
        for choice in get_args(field.annotation if field else None)
        if isinstance(choice, str)
    ]
    close = difflib.get_close_matches(str(given), choices, n=1)
    return f" (nearest: {close[0]!r})" if close else ""


def _nearest(path: str) -> str:
    """Name the known key that a wrong one probably meant: the same name elsewhere, or the most similar one."""
    section, _, leaf = path.rpartition(".")
    if not section:
        close = difflib.get_close_matches(leaf, _SECTIONS, n=1)
        hint = (
            f"did you mean [{close[0]}]?" if close else f"the sections are {', '.join(_SECTIONS)}."
        )
        return f"{hint} Rename it, or remove it"
    known = [key.path for key in recipe_keys()]
    own = [
        key.rpartition(".")[2] for key in known if key.partition(".")[0] == path.partition(".")[0]
    ]
    close = difflib.get_close_matches(leaf, own, n=1, cutoff=0.7)
    if close:
        return f"did you mean {section}.{close[0]}? Rename it, or remove it"
    leaves = {key.rpartition(".")[2]: key for key in reversed(known)}
    close = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.8)
    if close:
        return f"did you mean {leaves[close[0]]}? Move it there, or remove it"
    return f"[{section}] knows {', '.join(own)}. Remove it"


def _set_keys(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, section in table.items():
        if isinstance(section, dict):
            for key, value in section.items():
                yield f"{name}.{key}", value


def _error(problems: Sequence[Problem], where: str) -> RecipeError:
    lines = [f"  {problem.path}: {problem.text}" for problem in problems]
    number = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    message = "\n".join([f"{where} has {number}:", *lines])
    if all(problem.is_unsupported for problem in problems):
        return UnsupportedError(message)
    return RecipeError(message)
