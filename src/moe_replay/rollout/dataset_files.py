"""Rows of a dataset file, each knowing where it stands, so that an error can name its line.

In: a JSONL or Parquet file. Out: `Row` lists. Called by: rollout.prompts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_replay.errors import RecipeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One item of a dataset file."""

    number: int
    """From 0."""
    where: str
    """File and line, for messages."""
    columns: Mapping[str, Any]
    """Column -> value; None where this row lacks a column that others have."""


def read_rows(path: Path) -> list[Row]:
    """Read all rows of a ``.jsonl`` or ``.parquet`` file; every row gets every column.

    Raises:
        RecipeError: when the file is missing, empty, of another kind, or malformed.
    """
    if path.suffix not in (".jsonl", ".parquet"):
        raise RecipeError(
            f"dataset {path}: expected a .jsonl or .parquet file, or reasoning_gym:<family>, got the suffix "
            f"{path.suffix!r}"
        )
    if not path.is_file():
        near = sorted(file.name for file in path.parent.glob(f"*{path.suffix}"))
        raise RecipeError(
            f"dataset {path} does not exist; {path.parent} holds {', '.join(near) or f'no {path.suffix} file'}: "
            "correct the path (relative paths start at the recipe's folder)"
        )
    rows = _read_jsonl(path) if path.suffix == ".jsonl" else _read_parquet(path)
    if not rows:
        raise RecipeError(f"dataset {path} is empty: expected at least one row")
    names = list(dict.fromkeys(name for row in rows for name in row.columns))
    return [replace(row, columns={name: row.columns.get(name) for name in names}) for row in rows]


def _read_jsonl(path: Path) -> list[Row]:
    rows: list[Row] = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"dataset {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        where = f"{path} line {number}"
        if not line.strip():
            continue
        try:
            columns = json.loads(line)
        except json.JSONDecodeError as error:
            raise RecipeError(
                f"{where} is not valid JSON: {error.msg} at column {error.colno}; expected one object a line, such as "
                '{"prompt": "2 + 2 =", "answer": "4"}'
            ) from error
        if not isinstance(columns, dict):
            raise RecipeError(
                f"{where} holds a {type(columns).__name__}, expected an object with columns, such as "
                '{"prompt": "2 + 2 =", "answer": "4"}'
            )
        rows.append(Row(number=len(rows), where=where, columns=columns))
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise RecipeError(f"dataset {path} is not a readable Parquet file: {error}") from error
    return [
        Row(number=number, where=f"{path} row {number}", columns=columns)
        for number, columns in enumerate(table.to_pylist())
    ]
