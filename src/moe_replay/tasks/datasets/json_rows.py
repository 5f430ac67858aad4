"""Rows written in JSON, read strictly: what JSON does not have, or what would be lost in silence, is refused by line.

In: a line of bytes. Out: its columns.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from moe_replay.errors import RecipeError

_EXAMPLE = '{"prompt": "2 + 2 =", "answer": "4"}'
# Half of a character beyond U+FFFF: JSON can spell it alone, but no text holds it.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class _RefusedValueError(ValueError):
    """Something that the JSON module takes and we do not."""


def parse_row(line: bytes, where: str) -> dict[str, Any]:
    """Return the columns that a line of JSON holds.

    Raises:
        RecipeError: when it is not one object of JSON; ``where`` names the line.
    """
    columns = parse_strictly(_decoded(line.rstrip(b"\r\n"), where), where)
    if not isinstance(columns, dict):
        raise RecipeError(
            f"{where} holds a {type(columns).__name__}, expected an object with columns, such as {_EXAMPLE}"
        )
    return columns


def parse_strictly(text: str, where: str) -> Any:
    """Return the value of a JSON text in which no key comes twice and every number is finite.

    Raises:
        RecipeError: as `parse_row`.
    """
    try:
        value = _STRICT.decode(text)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise RecipeError(
            f"{where} is not valid JSON: {error.msg} at {_place(error)}; expected one object, such as {_EXAMPLE}"
        ) from None
    except UnicodeEncodeError as error:
        raise RecipeError(
            f"{where} holds the lone surrogate \\u{ord(error.object[error.start]):04x}, half of a character, which no "
            "tokenizer can read: correct the text"
        ) from None
    except _RefusedValueError as error:
        raise RecipeError(f"{where}: {error}") from None
    except RecursionError:
        raise RecipeError(
            f"{where} is nested too deeply to be read: expected columns such as {_EXAMPLE}"
        ) from None
    except ValueError as error:
        # A whole number of thousands of digits.
        raise RecipeError(f"{where} holds a number that cannot be read: {error}") from None
    return value


def _place(error: json.JSONDecodeError) -> str:
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
            f"the key {twice[:80]!r} comes twice in one object, and only one of its values could be kept: remove one"
        )
    return row


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _RefusedValueError(
            f"the number {text[:80]} is too large for a float: write it as a text, or correct it"
        )
    return value


def _refuse_constant(name: str) -> float:
    raise _RefusedValueError(f"{name} is not a number of JSON: write null, or a text")


_STRICT = json.JSONDecoder(
    object_pairs_hook=_unique, parse_float=_finite, parse_constant=_refuse_constant
)
