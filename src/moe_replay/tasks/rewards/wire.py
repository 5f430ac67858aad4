"""Frames between trainer and reward process: JSON that keeps types of values, no pickle.

A frame is two little-endian 64-bit lengths, that many bytes of JSON, and that many raw bytes (token
ids, which would be six times as long in JSON). JSON has fewer types than a dataset, so other types
are objects with one key that starts with ``$``: a tuple ``(1, 2)`` travels as ``{"$tuple": [1,
2]}``.
"""

from __future__ import annotations

import base64
import json
import struct
from array import array
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from io import BufferedIOBase
from typing import Any
from uuid import UUID

from moe_replay.tasks.generated import GeneratedTask

_LENGTHS = struct.Struct("<QQ")


def pack_frame(header: Mapping[str, Any], blob: bytes = b"") -> list[bytes]:
    """Return the parts of a frame, not joined, because those of a step are large."""
    # Text from JSON may hold half a surrogate pair, which is not UTF-8.
    text = json.dumps(header, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return [_LENGTHS.pack(len(text), len(blob)), text, blob]


def read_frame(stream: BufferedIOBase) -> tuple[dict[str, Any], bytes] | None:
    """Return the next frame of a stream, or None at its end."""
    lengths = stream.read(_LENGTHS.size)
    if len(lengths) < _LENGTHS.size:
        return None
    num_text, num_blob = _LENGTHS.unpack(lengths)
    text, blob = stream.read(num_text), stream.read(num_blob)
    if len(text) < num_text or len(blob) < num_blob:
        return None
    return _parse(text), blob


def take_frame(buffer: bytearray) -> dict[str, Any] | None:
    """Remove the first complete frame from a buffer and return its JSON, if there is one."""
    if len(buffer) < _LENGTHS.size:
        return None
    num_text, num_blob = _LENGTHS.unpack_from(buffer)
    end = _LENGTHS.size + num_text + num_blob
    if len(buffer) < end:
        return None
    header = _parse(bytes(buffer[_LENGTHS.size : _LENGTHS.size + num_text]))
    del buffer[:end]
    return header


def _parse(text: bytes) -> dict[str, Any]:
    return json.loads(text.decode("utf-8", "surrogatepass"))


def unpack_ids(blob: bytes, lengths: Sequence[int]) -> list[list[int]]:
    """Split concatenated 32-bit token ids into lists of the given lengths."""
    packed = array("i")
    packed.frombytes(blob)
    lists, start = [], 0
    for length in lengths:
        lists.append(packed[start : start + length].tolist())
        start += length
    return lists


def encode_value(value: Any) -> Any:
    """Return a dataset value as plain JSON.

    Examples:
        >>> encode_value({"when": (1, b"a")})
        {'when': {'$tuple': [1, {'$bytes': 'YQ=='}]}}

    Raises:
        TypeError: the type does not occur in dataset files.
    """
    if value is None or isinstance(value, bool):
        return value
    for kind, plain in _PLAIN:
        if isinstance(value, kind):
            # Subclasses, such as numpy.str_ and enumerations, arrive as the plain type.
            return value if type(value) is kind else plain(value)
    if isinstance(value, list):
        return [encode_value(item) for item in value]
    if isinstance(value, dict):
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: encode_value(item) for key, item in value.items()}
        return {"$dict": [[encode_value(k), encode_value(v)] for k, v in value.items()]}
    for tag, kind, encode, _ in _TAGGED:
        if isinstance(value, kind):
            return {tag: encode(value)}
    if hasattr(value, "dtype") and hasattr(value, "tobytes") and not value.dtype.hasobject:
        body = base64.b64encode(value.tobytes()).decode()
        return {"$array": [value.dtype.str, list(value.shape), body]}
    if hasattr(value, "dtype") and hasattr(value, "tolist"):
        return encode_value(value.tolist())
    if isinstance(value, GeneratedTask):
        return {"$task": [value.family, json.dumps(encode_value(dict(value.config)))]}
    raise TypeError(f"a {type(value).__module__}.{type(value).__qualname__}")


def decode_value(value: Any) -> Any:
    """Undo `encode_value`."""
    if isinstance(value, list):
        return [decode_value(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1 or not (tag := next(iter(value))).startswith("$"):
        return {key: decode_value(item) for key, item in value.items()}
    body = value[tag]
    if tag == "$dict":
        return {decode_value(k): decode_value(v) for k, v in body}
    if tag == "$array":
        return _array(*body)
    if tag == "$task":
        return _task(*body)
    decode = next(decode for name, _, _, decode in _TAGGED if name == tag)
    if tag in ("$tuple", "$set", "$frozenset"):
        body = decode_value(body)
    return decode(body)


@lru_cache(maxsize=8)
def _task(family: str, config: str) -> GeneratedTask:
    return GeneratedTask(family, decode_value(json.loads(config)))


def _array(dtype: str, shape: list[int], body: str) -> Any:
    # The process imports numpy only if a dataset holds arrays.
    import numpy as np

    values = np.frombuffer(base64.b64decode(body), dtype=np.dtype(dtype)).reshape(shape).copy()
    return values if shape else values[()]


def _encode_items(value: Any) -> list[Any]:
    return [encode_value(item) for item in value]


_PLAIN: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (str, str.__str__),
    (int, int),
    (float, float),
)
# Tag, type, encoder, decoder. A datetime is also a date, so it comes first.
_TAGGED: tuple[tuple[str, type, Callable[[Any], Any], Callable[[Any], Any]], ...] = (
    ("$tuple", tuple, _encode_items, tuple),
    ("$set", set, _encode_items, set),
    ("$frozenset", frozenset, _encode_items, frozenset),
    ("$bytes", bytes, lambda v: base64.b64encode(v).decode(), base64.b64decode),
    ("$datetime", datetime, lambda v: v.isoformat(), datetime.fromisoformat),
    ("$date", date, lambda v: v.isoformat(), date.fromisoformat),
    ("$time", time, lambda v: v.isoformat(), time.fromisoformat),
    (
        "$timedelta",
        timedelta,
        lambda v: [v.days, v.seconds, v.microseconds],
        lambda parts: timedelta(days=parts[0], seconds=parts[1], microseconds=parts[2]),
    ),
    ("$decimal", Decimal, str, Decimal),
    ("$fraction", Fraction, str, Fraction),
    ("$complex", complex, lambda v: [v.real, v.imag], lambda parts: complex(*parts)),
    ("$uuid", UUID, str, UUID),
)
