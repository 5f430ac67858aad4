"""Every key of a recipe by name: what the help lists, and which key a wrong name probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, get_args

from pydantic.fields import FieldInfo

from moe_replay.recipe.recipe import Recipe
from moe_replay.recipe.sections.base import Section, is_list, key_of, types_in
from moe_replay.recipe.sections.rollout import ENGINES


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeKey:
    """One key that a recipe may set, for help and documentation."""

    path: str
    """Dotted key; ``rewards.N.`` stands for any entry of the list."""
    default: str
    """TOML spelling of the default, ``required`` or ``none``."""
    choices: tuple[str, ...]
    """Values that it takes; empty where there are too many to list."""
    is_list: bool
    """Whether it takes several of them; one is written without brackets."""
    text: str
    """What it does."""


def section_classes(name: str) -> tuple[type[Section], ...]:
    """Return the class of a section; for ``rollout`` also those of the engines' keys."""
    own = tuple(
        kind
        for kind in types_in(Recipe.model_fields[name].annotation)
        if isinstance(kind, type) and issubclass(kind, Section)
    )
    return own + tuple(dict.fromkeys(ENGINES.values())) * (name == "rollout")


def _fields_by_section() -> dict[str, dict[str, FieldInfo]]:
    fields: dict[str, dict[str, FieldInfo]] = {}
    for name in Recipe.model_fields:
        fields[name] = {}
        for section in section_classes(name):
            # Of a key that several have, such as `engine`, the first is that of all engines.
            fields[name] = section.model_fields | fields[name]
    return fields


FIELDS: Mapping[str, Mapping[str, FieldInfo]] = _fields_by_section()
"""Section -> key -> its definition; those of ``[rollout]`` of every engine."""
LISTS = frozenset(name for name, field in Recipe.model_fields.items() if is_list(field.annotation))
"""Sections that are lists of tables."""


def recipe_keys() -> Iterator[RecipeKey]:
    """Yield every key that a recipe may set, in the order of the sections."""
    for name, fields in FIELDS.items():
        prefix = f"{name}.N" if name in LISTS else name
        for key, field in fields.items():
            yield RecipeKey(
                path=f"{prefix}.{key}",
                default=_default_of(field),
                choices=choices(name, key),
                is_list=is_list(field.annotation),
                text=text_of(field),
            )


def text_of(field: FieldInfo) -> str:
    """Return what a key does, in one line."""
    return " ".join((field.description or "").split())


def choices(section: str, key: str) -> tuple[str, ...]:
    """Return the texts that a key takes, inside lists and optional ones too; empty unless few.

    Example: a key of type ``tuple[Literal["a", "b"], ...]`` takes ``a`` and ``b``.
    """
    found: list[str] = []
    for fields in (owner.model_fields for owner in section_classes(section)):
        for kind in types_in(fields[key].annotation) if key in fields else ():
            if isinstance(kind, type) and issubclass(kind, Enum):
                found += [str(member.value) for member in kind]
            found += [choice for choice in get_args(kind) if isinstance(choice, str)]
    return tuple(dict.fromkeys(found))


def nearest(path: str) -> str:
    """Say which known key a wrong one probably meant: the same name elsewhere, or a similar one."""
    section, _, leaf = path.rpartition(".")
    if not section:
        close = difflib.get_close_matches(leaf, FIELDS, n=1)
        hint = f"did you mean [{close[0]}]?" if close else f"the sections are {', '.join(FIELDS)}."
        return f"{hint} Rename it, or remove it"
    # [rollout.engine] is [rollout] written in another way.
    section = section.removesuffix(".engine")
    own = list(FIELDS[path.partition(".")[0]])
    close = difflib.get_close_matches(leaf, own, n=1, cutoff=0.7)
    if close:
        return f"did you mean {section}.{close[0]}? Rename it, or remove it"
    elsewhere = nearest_keys(leaf)
    if elsewhere:
        return f"did you mean {elsewhere[0]}? Move it there, or remove it"
    return f"[{section}] knows {', '.join(own)}. Remove it"


def nearest_keys(name: str) -> Sequence[str]:
    """Return the dotted keys that a name without a section may mean, the likeliest first.

    Examples:
        >>> nearest_keys("lr")
        ['optimizer.lr']
    """
    leaf = name.replace("-", "_").lower()
    known = {
        f"{section}.0.{key}" if section in LISTS else f"{section}.{key}": (key, field)
        for section, fields in FIELDS.items()
        for key, field in fields.items()
    }
    equal = [path for path, (key, _) in known.items() if key == leaf]
    if equal:
        return equal
    called = [path for path, (_, field) in known.items() if leaf in key_of(field).also_called]
    if called:
        return called
    leaves = {key: path for path, (key, _) in reversed(known.items())}
    return [leaves[close] for close in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75)]


def _default_of(field: FieldInfo) -> str:
    if (described := key_of(field).default) is not None:
        return described
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        return "{}"
    return "none" if field.default is None else _spell(field.default)


def _spell(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return str(list(value))
    return f'"{value}"' if isinstance(value, str | Enum) else str(value)
