"""From a TOML file and dotted overrides to a `Recipe`, with all its problems reported at once."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from moe_replay.errors import RecipeError, nearest_of
from moe_replay.recipe.keys import FIELDS, LISTS, choices, nearest, section_classes, text_of
from moe_replay.recipe.recipe import Recipe, problems_error
from moe_replay.recipe.rule import Problem
from moe_replay.recipe.rules import effect_free_keys, rule_problems
from moe_replay.recipe.sections.base import Section, is_path, key_of
from moe_replay.recipe.sections.locations import anchored
from moe_replay.recipe.sections.rollout import RolloutSection, engine_class, owners
from moe_replay.recipe.sections.training import OWN_TRANSFORMER_KEYS

_ENGINE = "rollout.engine"


def load_recipe(
    source: Path | str | Mapping[str, Any],
    overrides: Sequence[tuple[str, str]] | Mapping[str, Any] = (),
) -> Recipe:
    """Read a recipe, apply dotted overrides, and check all of it.

    ``source`` is a TOML file, or nested tables. ``overrides`` holds pairs such as
    ``("grpo.beta", "0.1")`` or ``("rewards.0.weight", "2")``, where each text is read as a TOML
    value, or taken as a string where it is not one; or a mapping such as ``{"grpo.beta": 0.1}``,
    whose values are taken as they are. Relative paths in a file start at the file's folder, all
    others at the working directory.

    Raises:
        RecipeError: the file cannot be read, or anything in it is wrong; the message lists every
            problem found.
        UnsupportedError: all that is wrong is that something cannot be honoured.
    """
    if isinstance(source, Mapping):
        table, folder, where = _plain(source), Path.cwd(), "recipe"
    else:
        path = Path(source).expanduser().absolute()
        table, folder, where = _read_toml(path), path.parent, f"recipe {path}"
    _spread_engine(table)
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
    tables: dict[str, Any] = _plain(table)
    _spread_engine(tables)
    _lift_megatron_keys(tables)
    sections, problems = _validate_sections(tables)
    problems += rule_problems(sections)
    effect_free = effect_free_keys(sections)
    for key, value in _set_keys(tables):
        if key in effect_free:
            problems.append(
                Problem(
                    key,
                    f"set to {value!r}, but it has no effect: {effect_free[key]}. Remove it, or "
                    "change that",
                )
            )
    if problems:
        raise problems_error(problems, where)
    return Recipe(**sections)


def section_from_table(name: str, table: Mapping[str, Any], *, where: str) -> Section:
    """Check the keys of one section alone, for a command that takes no whole recipe.

    Rules between sections are not checked. ``where`` names the keys in errors.

    Raises:
        RecipeError: when a key is unknown, missing or wrong.
    """
    section, problems = _validate(name, _plain(table), name)
    if problems or section is None:
        raise problems_error(problems, where)
    return section


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
            f"recipe {path} is not valid TOML: {error}. Texts need quotes, and booleans are true "
            "and false"
        ) from error


def _spread_engine(table: dict[str, Any]) -> None:
    """Turn ``[rollout.engine]``, with ``kind`` and that engine's keys, into its short form.

    Example: ``engine = {kind = "vllm", kv_cache_gib = 4}`` becomes ``engine = "vllm"`` and
    ``kv_cache_gib = 4``. A key that is not one of an engine stays behind, and is refused.
    """
    rollout = table.get("rollout")
    if not isinstance(rollout, dict) or not isinstance(rollout.get("engine"), dict):
        return
    engine = rollout.pop("engine")
    for key, value in engine.items():
        own = "engine" if key == "kind" else key
        wrong = own in rollout or key in RolloutSection.model_fields
        rollout[f"engine.{key}" if wrong else own] = value


def _lift_megatron_keys(table: dict[str, Any]) -> None:
    """Move what ``[megatron.transformer]`` says of a key of ``[megatron]`` to that key.

    Example: ``[megatron.transformer] recompute_granularity = "full"`` becomes
    ``megatron.recompute_granularity``. If both are there, it stays behind, and is refused.
    """
    megatron = table.get("megatron")
    if not isinstance(megatron, dict) or not isinstance(megatron.get("transformer"), dict):
        return
    options = megatron["transformer"]
    for name in OWN_TRANSFORMER_KEYS & options.keys():
        if name not in megatron:
            megatron[name] = options.pop(name)


def _make_paths_absolute(table: dict[str, Any], folder: Path) -> None:
    for section, values in table.items():
        entries = values if isinstance(values, list) else [values]
        for entry in entries:
            if isinstance(entry, dict):
                for key, value in entry.items():
                    entry[key] = _absolute(section, key, value, folder)


def _absolute(section: str, key: str, value: Any, folder: Path) -> Any:
    """Anchor a value at a folder if its key holds a path; return any other value as it is."""
    field = FIELDS.get(section, {}).get(key)
    if isinstance(value, list) and field is not None:
        return [_absolute(section, key, each, folder) for each in value]
    if field is None or not isinstance(value, str) or not is_path(field):
        return value
    return (key_of(field).anchor or anchored)(value, folder)


def _plain(value: Any) -> Any:
    """Return a copy of a Python value in the types that TOML has."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def _override(table: dict[str, Any], path: str, value: Any) -> None:
    if path == f"{_ENGINE}.kind":
        path = _ENGINE
    elif path.startswith(f"{_ENGINE}."):
        path = f"rollout.{path.removeprefix(f'{_ENGINE}.')}"
    *parents, last = path.split(".")
    target: Any = table
    for depth, part in enumerate(parents):
        if isinstance(target, list):
            target = target[_entry_index(target, part, path)]
        else:
            target = target.setdefault(part, {})
        if not isinstance(target, dict | list):
            raise RecipeError(
                f"--{path} {value}: {'.'.join(parents[: depth + 1])} is the value {target!r}, not "
                "a table: override the value itself"
            )
    value = _absolute(parents[0] if parents else "", last, value, Path.cwd())
    if isinstance(target, list):
        target[_entry_index(target, last, path)] = value
    else:
        target[last] = value


def _entry_index(entries: list[Any], part: str, path: str) -> int:
    if not part.isdigit() or int(part) >= len(entries):
        raise RecipeError(
            f"--{path}: {part!r} names no entry of a list of {len(entries)}, whose entries are "
            "counted from 0: override an existing entry, or add one in the recipe"
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
            name,
            f"set to {table[name]!r}, but there is no such section or key; {nearest(name)}",
        )
        for name in table
        if name not in FIELDS
    ]
    sections: dict[str, Any] = {}
    for name in FIELDS:
        if name in LISTS:
            needed = name == "rewards" and "environment" not in table
            entries, found = _validate_list(name, table.get(name, []), needed=needed)
        elif name not in table and Recipe.model_fields[name].get_default() is None:
            entries, found = None, []
        else:
            entries, found = _validate(name, table.get(name, {}), name)
        problems += found
        if not found:
            sections[name] = entries
    return sections, problems


def _validate_list(
    name: str, entries: Any, *, needed: bool
) -> tuple[tuple[Section | None, ...], list[Problem]]:
    """Return the tables of a list; ``needed`` says that there must be one.

    Rewards are not where an environment is, which may score what was done in it.
    """
    if needed and (not isinstance(entries, list) or not entries):
        text = (
            f"got {entries!r}, expected at least one [[rewards]] table, such as [[rewards]] "
            'with function = "exact_match"'
        )
        return (), [Problem(name, text)]
    if not isinstance(entries, list):
        return (), [Problem(name, f"got {entries!r}, expected tables: write [[{name}]]")]
    validated = [_validate(name, entry, f"{name}.{n}") for n, entry in enumerate(entries)]
    return tuple(v for v, _ in validated), [problem for _, found in validated for problem in found]


def _validate(name: str, table: Any, prefix: str) -> tuple[Section | None, list[Problem]]:
    if not isinstance(table, dict):
        return None, [
            Problem(prefix, f"got the value {table!r}, expected a table: write [{prefix}]")
        ]
    section = section_classes(name)[0]
    if section is RolloutSection:
        section = engine_class(table) or section
        if section is RolloutSection:
            # One problem is enough: what its keys mean depends on the engine.
            table = {key: value for key, value in table.items() if not owners(key)}
    try:
        return section.model_validate(table), []
    except ValidationError as error:
        # A default that follows from another key is missing only because that key is wrong.
        errors = [each for each in error.errors() if each["type"] != "default_factory_not_called"]
        return None, [_problem(section, table, prefix, details) for details in errors]


def _problem(
    section: type[Section], table: Mapping[str, Any], prefix: str, details: ErrorDetails
) -> Problem:
    name = prefix.partition(".")[0]
    path = ".".join([prefix, *map(str, details["loc"])])
    given, key = details["input"], str(details["loc"][0])
    field = section.model_fields.get(key)
    if field is None and name == "rollout" and owners(key):
        engine = table.get("engine", section.model_fields["engine"].default)
        text = (
            f"set to {given!r}, but rollout.engine = {engine!r} has no such key; it "
            f"belongs to {', '.join(map(repr, owners(key)))}. Remove it, or choose such an engine"
        )
    elif field is None:
        text = f"set to {given!r}, but there is no such key; {nearest(path)}"
    elif details["type"] == "missing":
        text = f"missing, and it has no default. It is: {_plain_text(field)}"
    else:
        expected = details["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        near = nearest_of(str(given), choices(name, key))
        text = f"got {given!r}, expected {expected}{near}. It is: {_plain_text(field)}"
    return Problem(path, text)


def _plain_text(field: FieldInfo) -> str:
    return text_of(field).replace("``", "")


def _set_keys(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, section in table.items():
        if isinstance(section, dict):
            for key, value in section.items():
                yield f"{name}.{key}", value
        elif isinstance(section, list):
            for number, entry in enumerate(section):
                if isinstance(entry, dict):
                    yield from ((f"{name}.{number}.{key}", v) for key, v in entry.items())
