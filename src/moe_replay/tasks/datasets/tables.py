"""Rows of a dataset by index, read one at a time: a process holds an index, not the rows."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from moe_replay.errors import RecipeError, shortened
from moe_replay.recipe.sections.locations import HUB
from moe_replay.tasks.datasets.arrow_rows import ArrowRows, open_arrow_rows, read_hub_table
from moe_replay.tasks.datasets.cache import DatasetCache
from moe_replay.tasks.datasets.files import dataset_files
from moe_replay.tasks.datasets.json_rows import open_json_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One item of a dataset."""

    number: int
    """Index from 0, over all files."""
    where: str
    """File and line, for messages."""
    columns: Mapping[str, Any]
    """Column -> value; None if this row lacks a column that others have."""


@runtime_checkable
class Rows(Protocol):
    """The rows of one file."""

    @property
    def names(self) -> Sequence[str]:
        """Columns that at least one row has."""
        ...

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def where(self, number: int) -> str:
        """Return file and line of a row."""
        ...

    def read(self, number: int) -> Mapping[str, Any]:
        """Return the columns of a row."""
        ...

    def scan(self) -> Iterator[Mapping[str, Any]]:
        """Yield the columns of all rows in order, faster than one by one."""
        ...


class Table:
    """The rows of all files of a dataset. Make one with `open_table`."""

    def __init__(self, location: str, files: Sequence[Path], parts: Sequence[Rows]) -> None:
        self.location = location
        """Its spelling in the recipe, for messages."""
        self.files = tuple(files)
        """Files of the rows."""
        self.names = tuple(dict.fromkeys(name for part in parts for name in part.names))
        """Columns that at least one row has."""
        self._parts = tuple(parts)
        self._starts = [0, *accumulate(len(part) for part in parts)]

    @property
    def nulls_are_absent(self) -> bool:
        """Whether None in a value may mean a missing field, as in Arrow tables."""
        return any(isinstance(part, ArrowRows) for part in self._parts)

    def __len__(self) -> int:
        return self._starts[-1]

    def has(self, path: str) -> bool:
        """Return whether there is a column of that name, or the first column of a dotted path."""
        return path in self.names or path.partition(".")[0] in self.names

    def row(self, number: int) -> Row:
        """Return one row."""
        part = bisect_right(self._starts, number) - 1
        within = number - self._starts[part]
        return self._row(number, self._parts[part], within, self._parts[part].read(within))

    def scan(self) -> Iterator[Row]:
        """Yield all rows in order."""
        number = 0
        for part in self._parts:
            for within, columns in enumerate(part.scan()):
                yield self._row(number, part, within, columns)
                number += 1

    def _row(self, number: int, part: Rows, within: int, columns: Mapping[str, Any]) -> Row:
        return Row(
            number=number,
            where=part.where(within),
            columns={name: columns.get(name) for name in self.names},
        )


def open_table(
    location: str,
    *,
    split: str = "train",
    hub_config: str | None = None,
    cache: DatasetCache | None = None,
) -> Table:
    """Open a file, a folder of files, or a dataset of the Hugging Face hub (``hf:ORG/NAME``).

    Raises:
        RecipeError: it is missing, empty, of another kind, or malformed.
    """
    if location.startswith(HUB):
        table, files = read_hub_table(location.removeprefix(HUB), config=hub_config, split=split)
        opened = Table(location, files, [ArrowRows(location, table)])
    else:
        files = dataset_files(location, split=split)
        cache = cache or DatasetCache(None)
        is_json = files[0].suffix in (".json", ".jsonl")
        opener = open_json_rows if is_json else open_arrow_rows
        name = f"{location} split {split}" if Path(location).is_dir() else location
        opened = Table(name, files, [opener(path, cache=cache) for path in files])
    if not len(opened):
        raise RecipeError(f"dataset {opened.location} is empty: expected at least one row")
    return opened


def column_value(columns: Mapping[str, Any], path: str) -> Any:
    """Return a column, or the value at a dotted path inside it; None if the row lacks it.

    Examples:
        >>> column_value({"reward_model": {"ground_truth": "4"}}, "reward_model.ground_truth")
        '4'
        >>> column_value({"turns": [{"text": "a"}, {"text": "b"}]}, "turns.-1.text")
        'b'
    """
    if path in columns:
        return columns[path]
    name, dot, rest = path.partition(".")
    value = columns.get(name)
    while dot:
        name, dot, rest = rest.partition(".")
        if isinstance(value, Mapping):
            value = value.get(name)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            index = int(name) if name.lstrip("-").isdigit() else len(value)
            value = value[index] if -len(value) <= index < len(value) else None
        else:
            return None
    return value


def require_column(table: Table, path: str, key: str) -> None:
    """Raise `RecipeError`, naming ``key``, unless the table has the first column of a path."""
    if not table.has(path):
        raise RecipeError(
            f"{key} names {path!r}, but {table.location} has no column {path.partition('.')[0]!r}; its columns are "
            f"{shortened(table.names)}"
        )
