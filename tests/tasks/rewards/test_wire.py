"""What crosses between trainer and reward process arrives as it was."""

from __future__ import annotations

import io
from datetime import UTC
from typing import Any

import numpy as np
import pytest
import reasoning_gym
from hypothesis import given
from hypothesis import strategies as st

from moe_replay.tasks.generated import GeneratedTask
from moe_replay.tasks.rewards.wire import (
    decode_value,
    encode_value,
    pack_frame,
    read_frame,
    take_frame,
    unpack_ids,
)

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec=None))
    | st.binary()
    | st.dates()
    | st.times()
    | st.datetimes(timezones=st.none() | st.just(UTC))
    | st.timedeltas()
    | st.decimals(allow_nan=False)
    | st.fractions()
    | st.complex_numbers(allow_nan=False)
    | st.uuids()
)
KEYS = st.text() | st.integers() | st.tuples(st.integers(), st.text()) | st.just("$tuple")
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(KEYS, inner)
        | st.frozensets(st.integers() | st.text())
        | st.sets(st.integers())
    ),
    max_leaves=10,
)


def over_the_wire(value: Any) -> Any:
    stream = io.BytesIO(b"".join(pack_frame({"value": encode_value(value)}, b"ids")))
    frame = read_frame(stream)
    assert frame is not None
    assert frame[1] == b"ids"
    assert read_frame(stream) is None
    return decode_value(frame[0]["value"])


def same(a: Any, b: Any) -> bool:
    """Return whether two values are equal, types included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(
            same(x, y) and same(a[x], b[y]) for x, y in zip(a, b, strict=True)
        )
    return a == b


@given(VALUES)
def test_values_keep_their_types(value: Any) -> None:
    assert same(over_the_wire(value), value)


def test_same_tells_types_apart() -> None:
    assert not same({"a": (1,)}, {"a": [1]})
    assert not same({1: "a"}, {"1": "a"})
    assert not same(True, 1)


@pytest.mark.parametrize(
    "array", [np.arange(6, dtype=np.int16).reshape(2, 3), np.array(["a", "bc"]), np.zeros((0, 2))]
)
def test_arrays_keep_their_types(array: np.ndarray) -> None:
    arrived = over_the_wire([array])[0]
    np.testing.assert_array_equal(arrived, array, strict=True)
    assert arrived.flags.writeable


def test_scalars_and_objects_of_numpy_arrive_as_values() -> None:
    assert over_the_wire([np.float32(0.5), np.str_("a"), np.datetime64("2020-01-01")]) == [
        np.float32(0.5),
        "a",
        np.datetime64("2020-01-01"),
    ]
    assert over_the_wire(np.array([{"a": 1}, None], dtype=object)) == [{"a": 1}, None]


def test_other_objects_are_refused_by_type() -> None:
    with pytest.raises(TypeError, match=r"a builtins\.object"):
        encode_value({"a": [object()]})


def test_half_a_surrogate_pair_arrives() -> None:
    assert over_the_wire("\ud800") == "\ud800"


@pytest.mark.parametrize("family", ["chain_sum", "graph_color", "knights_knaves", "maze"])
def test_generated_metadata_arrives_as_it_was(family: str) -> None:
    metadata = reasoning_gym.create_dataset(family, seed=3, size=1)[0]["metadata"]
    assert over_the_wire(metadata) == metadata
    # Or tuples would arrive as lists, which are not equal to them.
    assert over_the_wire((metadata,)) != [metadata]


def test_generated_task_is_the_same_task() -> None:
    task = GeneratedTask("chain_sum", {"max_terms": 2})
    arrived = over_the_wire({"task": task})["task"]
    assert arrived.name == task.name
    assert arrived.item(1, 300) == task.item(1, 300)


def test_frames_are_taken_when_they_are_whole() -> None:
    sent = b"".join([*pack_frame({"a": "\u00e9"}), *pack_frame({"b": 1})])
    buffer, taken = bytearray(), []
    for byte in sent:
        buffer.append(byte)
        taken += [frame] if (frame := take_frame(buffer)) is not None else []
    assert taken == [{"a": "\u00e9"}, {"b": 1}]
    assert not buffer


def test_cut_frame_is_no_frame() -> None:
    sent = b"".join(pack_frame({"a": 1}, b"123"))
    assert [read_frame(io.BytesIO(sent[:end])) for end in range(len(sent))] == [None] * len(sent)


def test_token_ids_are_cut_where_they_were_joined() -> None:
    joined = np.array([1, 2, 3, 2**31 - 1], dtype="<i4").tobytes()
    assert unpack_ids(joined, [3, 0, 1]) == [[1, 2, 3], [], [2**31 - 1]]
