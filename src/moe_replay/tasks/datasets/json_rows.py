"""Rows of JSON files, read strictly: what would be lost silently is refused with its line.

Lines are found by their offsets, so that a row is read from disk when it is needed; small arrays
are held in memory.
"""

from __future__ import annotations

import json
import math
import os
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from moe_replay.errors import RecipeError
from moe_replay.tasks.datasets.cache import DatasetCache, entry_key

_BOM = b"\xef\xbb\xbf"
_REPORT_ROWS = 5000
_EXAMPLE = '{"prompt": "2 + 2 =", "answer": "4"}'
# Half of a character beyond U+FFFF: JSON can spell it alone, but no text can contain it.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class JsonLines:
    """The lines of a file that hold a row, read by position.

    Nothing is mapped, so a truncated file is an error.
    """

    def __init__(
        self, path: Path, index: Int64[np.ndarray, "3 rows"], names: Sequence[str], *, label: str
    ) -> None:
        self.names = tuple(names)
        """Columns that at least one row has."""
        self._path = path
        self._starts, self._sizes, self._lines = index
        self._label = label
        self._file = path.open("rb", buffering=0)

    def __len__(self) -> int:
        return len(self._starts)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def where(self, number: int) -> str:
        """Return file and line of a row."""
        return f"{self._label} {self._lines[number]}"

    def read(self, number: int) -> Mapping[str, Any]:
        """Return the columns of a row."""
        line = os.pread(self._file.fileno(), int(self._sizes[number]), int(self._starts[number]))
        return self._parse(line, number)

    def scan(self) -> Iterator[Mapping[str, Any]]:
        """Yield the columns of all rows in order."""
        with self._path.open("rb") as file:
            for number, (start, size) in enumerate(zip(self._starts, self._sizes, strict=True)):
                if file.tell() != start:
                    file.seek(start)
                yield self._parse(file.read(int(size)), number)

    def _parse(self, line: bytes, number: int) -> Mapping[str, Any]:
        try:
            columns = json.loads(line.decode())
        except ValueError:
            columns = None
        if not isinstance(columns, dict):
            raise RecipeError(
                f"{self.where(number)} has changed since the dataset was opened: start again, and do not change the file "
                "during a run"
            )
        return columns


class JsonItems:
    """The items of a small array, held in memory."""

    def __init__(self, path: Path, items: Sequence[Mapping[str, Any]]) -> None:
        self.names = tuple(dict.fromkeys(name for item in items for name in item))
        """Columns that at least one item has."""
        self._path = path
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def where(self, number: int) -> str:
        """Return file and index of an item."""
        return f"{self._path} item {number}"

    def read(self, number: int) -> Mapping[str, Any]:
        """Return a copy of the columns of an item, like `JsonLines.read`."""
        return json.loads(json.dumps(self._items[number]))

    def scan(self) -> Iterator[Mapping[str, Any]]:
        """Yield the columns of all items in order."""
        yield from self._items


def open_json_rows(path: Path, *, cache: DatasetCache) -> JsonLines | JsonItems:
    """Read a file once, strictly; a ``.json`` file may hold lines or one array.

    Raises:
        RecipeError: it cannot be read, or a line is malformed.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4096).removeprefix(_BOM).lstrip()
    except OSError as error:
        raise RecipeError(f"dataset {path} cannot be read: {error}") from error
    is_array = path.suffix == ".json" and start.startswith(b"[")
    return _open_array(path, cache) if is_array else _open_lines(path, cache)


def _open_lines(path: Path, cache: DatasetCache) -> JsonLines:
    if cache.is_worth_it([path]):
        entry = cache.entry(
            entry_key([path], "lines"), lambda folder: _write_index(folder, *_index(path, cache))
        )
        if entry is not None:
            return _mapped_lines(path, entry, label=f"{path} line")
    index, names = _index(path, cache)
    return JsonLines(path, index, names, label=f"{path} line")


def _open_array(path: Path, cache: DatasetCache) -> JsonLines | JsonItems:
    if cache.is_worth_it([path]):

        def write_lines(folder: Path) -> None:
            lines = folder / path.with_suffix(".jsonl").name
            with lines.open("w", encoding="utf-8") as file:
                for item in _items(path):
                    file.write(json.dumps(item, ensure_ascii=False) + "\n")
            index, names = _index(lines, cache)
            index[2] -= 1  # items count from 0, as in an array in memory
            _write_index(folder, index, names)

        entry = cache.entry(entry_key([path], "array"), write_lines)
        if entry is not None:
            lines = entry / path.with_suffix(".jsonl").name
            return _mapped_lines(lines, entry, label=f"{path} item")
    return JsonItems(path, _items(path))


def _items(path: Path) -> list[Mapping[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"dataset {path} cannot be read: {error}") from error
    items = parse_strictly(text, str(path))
    for number, item in enumerate(items):
        if not isinstance(item, dict):
            raise RecipeError(
                f"{path} item {number} is a {type(item).__name__}, expected an object with columns, such as {_EXAMPLE}"
            )
    return items


def _index(path: Path, cache: DatasetCache) -> tuple[Int64[np.ndarray, "3 rows"], list[str]]:
    """Return start, size and line number of every row, and the names of all columns."""
    starts, sizes, lines = array("q"), array("q"), array("q")
    names: dict[str, None] = {}
    total, start = path.stat().st_size, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            size = len(line)
            if number == 1 and line.startswith(_BOM):
                start, size, line = start + 3, size - 3, line[3:]
            if line.strip():
                row = parse_row(line, f"{path} line {number}")
                if not row.keys() <= names.keys():
                    names |= dict.fromkeys(row)
                starts.append(start)
                sizes.append(size)
                lines.append(number)
            start += size
            if number % _REPORT_ROWS == 0:
                cache.report(f"reading {path.name}, bytes", start, total)
    return np.array([starts, sizes, lines], dtype=np.int64), list(names)


def _write_index(folder: Path, index: Int64[np.ndarray, "3 rows"], names: Sequence[str]) -> None:
    np.save(folder / "index.npy", index)
    (folder / "names.json").write_text(json.dumps(list(names)))


def _mapped_lines(path: Path, entry: Path, *, label: str) -> JsonLines:
    index = np.load(entry / "index.npy", mmap_mode="r")
    return JsonLines(path, index, json.loads((entry / "names.json").read_text()), label=label)


class _RefusedValueError(ValueError):
    """Something that the JSON module accepts and we do not."""


def parse_row(line: bytes, where: str) -> dict[str, Any]:
    """Return the columns of a line of JSON.

    Raises:
        RecipeError: it is not one JSON object; ``where`` names the line.
    """
    columns = parse_strictly(_decoded(line.rstrip(b"\r\n"), where), where)
    if not isinstance(columns, dict):
        raise RecipeError(
            f"{where} holds a {type(columns).__name__}, expected an object with columns, such as {_EXAMPLE}"
        )
    return columns


def parse_strictly(text: str, where: str) -> Any:
    """Return the value of a JSON text without duplicate keys or non-finite numbers.

    Raises:
        RecipeError: as `parse_row`.
    """
    try:
        value = _STRICT.decode(text)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise RecipeError(
            f"{where} is not valid JSON: {error.msg} at {_position(error)}; expected one object, such as {_EXAMPLE}"
        ) from None
    except UnicodeEncodeError as error:
        raise RecipeError(
            f"{where} holds the lone surrogate \\u{ord(error.object[error.start]):04x}, half of a character, which no "
            "tokenizer can read: fix the text"
        ) from None
    except _RefusedValueError as error:
        raise RecipeError(f"{where}: {error}") from None
    except RecursionError:
        raise RecipeError(
            f"{where} is nested too deeply to be read: expected columns such as {_EXAMPLE}"
        ) from None
    except ValueError as error:
        # An integer of thousands of digits.
        raise RecipeError(f"{where} holds a number that cannot be read: {error}") from None
    return value


def _position(error: json.JSONDecodeError) -> str:
    return (
        f"line {error.lineno} column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
    )


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        utf16 = line[:2] in (b"\xff\xfe", b"\xfe\xff")
        cause = "the file looks like UTF-16" if utf16 else "it may be Latin-1 or damaged"
        raise RecipeError(
            f"{where} is not UTF-8: byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line ({cause}): "
            "save the file as UTF-8"
        ) from None


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _RefusedValueError(
            f"the key {twice[:80]!r} occurs twice in one object, and only one of its values could be kept: remove one"
        )
    return row


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _RefusedValueError(
            f"the number {text[:80]} is too large for a float: write it as a string, or correct it"
        )
    return value


def _refuse_constant(name: str) -> float:
    raise _RefusedValueError(f"{name} is not a JSON number: write null, or a string")


_STRICT = json.JSONDecoder(
    object_pairs_hook=_unique, parse_float=_finite, parse_constant=_refuse_constant
)
