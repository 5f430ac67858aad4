"""What every section is made of: strict frozen tables, and marks on keys.

A key is one line in its section. What the program must know of it beyond type, default and range
stands on it too, as `Key`::

    lr: Annotated[float, Key(also_called=("learning_rate",))] = Field(default=1e-6, gt=0)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

T = TypeVar("T")

Dtype = Literal["float32", "bfloat16"]
TomlPath = Annotated[Path, Field(strict=False)]
"""A path, which TOML writes as a string; a relative one starts at the folder of the recipe."""
Several = Annotated[tuple[T, ...], Field(strict=False)]
"""Several values; a single one needs no brackets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What is true of a key beyond its type, default, range and text."""

    may_change: bool | Callable[..., bool] | None = None
    """Whether a run resumes although the value has changed, because it does not decide results. A
    function is asked with the sections that its parameters name; None: as the section says."""
    may_change_inside: frozenset[str] = frozenset()
    """Of a key that holds a table and may not change: names in it that may."""
    anchor: Callable[[str, Path], str] | None = None
    """(value, folder) -> value, for a text that may hold a path, which then starts at the folder.
    Keys of type `TomlPath` need none."""
    holds_secrets: bool = False
    """Whether its texts may hold credentials, which are masked in everything that is written."""
    default: str | None = None
    """What the help says of a default that follows from other keys."""
    also_called: tuple[str, ...] = ()
    """Names of other trainers for it, for suggestions."""


class Section(BaseModel):
    """Base of every table of a recipe: frozen, strict types (an int may stand for a float)."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        validate_default=True,
    )

    may_change: ClassVar[bool] = False
    """`Key.may_change` of the keys that do not say it themselves."""

    @model_validator(mode="before")
    @classmethod
    def _take_one_value_for_a_list(cls, table: Any) -> Any:
        """Take ``sinks = "wandb"`` for ``sinks = ["wandb"]``."""
        if not isinstance(table, dict):
            return table
        fields = cls.model_fields
        return {
            key: (value,)
            if key in fields and is_list(fields[key].annotation) and _is_single(value)
            else value
            for key, value in table.items()
        }


def key_of(field: FieldInfo) -> Key:
    """Return the mark of a key; an empty one where there is none."""
    return next((mark for mark in field.metadata if isinstance(mark, Key)), Key())


def types_in(annotation: Any) -> Iterator[Any]:
    """Yield a type, and the types inside a list or an optional one.

    Examples:
        >>> Path in types_in(Path | None)
        True
    """
    yield annotation
    for inner in get_args(annotation):
        yield from types_in(inner)


def is_list(annotation: Any) -> bool:
    """Return whether a type is a list of values, optional ones included."""
    return any(get_origin(kind) is tuple for kind in types_in(annotation))


def is_path(field: FieldInfo) -> bool:
    """Return whether a key's value is a path, or a text that may hold one."""
    return Path in types_in(field.annotation) or key_of(field).anchor is not None


def sections_for(
    function: Callable[..., Any], sections: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return the sections that a function names, or None where one is missing or of another class.

    Examples:
        >>> def files_only(rollout: FilesEngineSection): ...
        >>> sections_for(files_only, {"rollout": VllmEngineSection(...)}) is None
        True
    """
    hints = get_type_hints(function)
    hints.pop("return")
    if all(isinstance(sections.get(name), _checkable(kind)) for name, kind in hints.items()):
        return {name: sections.get(name) for name in hints}
    return None


def _checkable(kind: Any) -> Any:
    """Return what `isinstance` takes of a type: ``tuple`` of ``tuple[A, ...]``."""
    origin = get_origin(kind)
    return kind if origin in (None, UnionType) else origin


def _is_single(value: object) -> bool:
    return not isinstance(value, list | tuple | dict) and value is not None
