"""Check the arguments of `check_routes` once, and turn them into rows."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_replay.errors import TraceError
from moe_replay.routing.arrays import as_array, check_holds_ids
from moe_replay.routing.guard.places import RouteRows
from moe_replay.routing.guard.verdict import Owner

if TYPE_CHECKING:
    from jaxtyping import Bool, Int64, Integer, Shaped

MAX_LAYER = 2**15 - 1
"""Largest layer index that evidence can hold."""
_MAX_POSITION = 2**31 - 1
_WHERE = "check_routes"


def given_rows(
    expert_ids: Any,
    live_ids: Any,
    sample: Any,
    position: Any,
    valid: Any,
    layers: Any,
    num_experts: Any,
) -> RouteRows:
    """Return the rows of a step from the arguments of `check_routes`.

    Raises:
        TraceError: an argument has an invalid type, shape or range, or live ids are not a top-k.
    """
    if not _is_integer(num_experts) or num_experts < 1:
        raise TraceError(
            f"{_WHERE}: num_experts is {num_experts!r}, expected an integer above 0: the routed experts of one layer, from "
            "the model's config"
        )
    replayed, live = _array("expert_ids", expert_ids), _array("live_ids", live_ids)
    numbers = _integers("sample", sample, "the id of the sample of each row")
    held = None if valid is None else _array("valid", valid)
    at = (
        None
        if position is None
        else _integers("position", position, "the position of each row in its sample")
    )
    every = _layer_numbers(layers, replayed)
    _check_shapes(
        {"expert_ids": replayed, "live_ids": live},
        {"sample": numbers, "valid": held, "position": at},
        len(every),
    )
    for name, ids in (("expert_ids", replayed), ("live_ids", live)):
        _check_ids(name, ids, int(num_experts))
    is_valid = numbers >= 0 if held is None else _mask(held) & (numbers >= 0)
    _check_live(live[is_valid], int(num_experts))
    if at is None:
        at = _positions(numbers)
    _check_positions(at[is_valid])
    return RouteRows(
        expert_ids=replayed,
        live_ids=live,
        valid=is_valid,
        sample=numbers,
        position=at,
        layers=every,
        num_experts=int(num_experts),
    )


def check_signs(gaps: Any, owners: Any) -> None:
    """Raise `TraceError` unless gaps and owners map sample ids to numbers and `Owner`."""
    for name, given, kind, what in (
        ("gaps", gaps, Real, "a number, the sample's mean k3"),
        ("owners", owners, Owner, "an Owner"),
    ):
        if given is None:
            continue
        if not isinstance(given, Mapping):
            raise TraceError(
                f"{_WHERE}: {name} is a {type(given).__name__}, expected a mapping from sample id to {what}: "
                f"write dict(enumerate({name})) if sample ids have that order"
            )
        for number, value in given.items():
            if not isinstance(value, kind):
                raise TraceError(
                    f"{_WHERE}: {name}[{number!r}] is {value!r}, expected {what}; omit samples of which nothing is known"
                )


def _array(name: str, values: Any) -> Shaped[np.ndarray, "..."]:
    try:
        return as_array(values)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = getattr(values, "dtype", type(values).__name__)
        raise TraceError(
            f"{_WHERE}: {name} is {kind} and cannot become an array ({error}), expected a numpy array, a dense torch tensor "
            "or lists of equal length; bfloat16 cannot hold integers above 256, so use the ids before conversion"
        ) from error


def _integers(name: str, values: Any, what: str) -> Int64[np.ndarray, "..."]:
    array = _array(name, values)
    if not np.issubdtype(array.dtype, np.integer) and array.size:
        raise TraceError(
            f"{_WHERE}: {name} is {array.dtype}, expected integers: {what}; if its values are integers, convert it where it "
            "is made, because nothing is rounded here"
        )
    if array.dtype == np.uint64 and array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise TraceError(
            f"{_WHERE}: {name} holds {int(array.max())}, expected integers of 63 bits: {what}; -1 probably became this in an "
            "unsigned type: use a signed one"
        )
    return array.astype(np.int64)


def _layer_numbers(layers: Any, ids: Shaped[np.ndarray, "..."]) -> tuple[int, ...]:
    if layers is None:
        return tuple(range(ids.shape[1] if ids.ndim == 3 else 0))
    expected = f"expected integers from 0 to {MAX_LAYER}, each once: the decoder index of each entry of the layer dim"
    try:
        given = list(layers)
    except TypeError as error:
        raise TraceError(f"{_WHERE}: layers is {layers!r}, {expected}") from error
    for layer in given:
        if not _is_integer(layer) or not 0 <= layer <= MAX_LAYER:
            raise TraceError(
                f"{_WHERE}: layers holds {layer!r}, {expected}; an offset or a name was passed instead"
            )
    numbers = tuple(int(layer) for layer in given)
    if len(set(numbers)) < len(numbers):
        twice = sorted({layer for layer in numbers if numbers.count(layer) > 1})
        raise TraceError(
            f"{_WHERE}: layers names {twice[:8]} more than once, {expected}; pipeline stages may each count their layers from 0: "
            "add the offset of each stage"
        )
    return numbers


def _check_shapes(
    ids: Mapping[str, np.ndarray], rows: Mapping[str, np.ndarray | None], num_layers: int
) -> None:
    replayed, live = ids.values()
    expected = replayed.shape[:1]
    held = {name: array for name, array in rows.items() if array is not None}
    if (
        replayed.ndim != 3
        or live.shape != replayed.shape
        or any(array.shape != expected for array in held.values())
        or num_layers != replayed.shape[1]
        or not replayed.shape[1] * replayed.shape[2]
    ):
        shapes = ", ".join(f"{name} {array.shape}" for name, array in {**ids, **held}.items())
        raise TraceError(
            f"{_WHERE}: got {shapes} and {num_layers} layers, expected [rows, layers, topk] twice and [rows] for the "
            "others: pass the rows of one step, replayed and live in the same order"
        )


def _check_ids(name: str, ids: Shaped[np.ndarray, "..."], num_experts: int) -> None:
    if not np.issubdtype(ids.dtype, np.integer):
        raise TraceError(
            f"{_WHERE}: {name} is {ids.dtype}, expected integers: expert ids; scores or probabilities were passed "
            "instead, or ids were cast to a float type: pass them as the router's top-k returns them"
        )
    check_holds_ids(ids, num_experts, where=f"{_WHERE}: {name}")


def _check_live(own: Integer[np.ndarray, "rows layers topk"], num_experts: int) -> None:
    ordered = np.sort(own, axis=2)
    if own.size and (
        own.min() < 0 or own.max() >= num_experts or (ordered[..., 1:] == ordered[..., :-1]).any()
    ):
        raise TraceError(
            f"{_WHERE}: live_ids has ids outside 0..{num_experts - 1}, or duplicates in a row, expected the top-k of the "
            "trainer's router: take them where the router computes its scores"
        )


def _mask(valid: Shaped[np.ndarray, " rows"]) -> Bool[np.ndarray, " rows"]:
    if valid.dtype == bool or not valid.size:
        return valid.astype(bool)
    if not np.issubdtype(valid.dtype, np.integer) or not np.isin(valid, (0, 1)).all():
        raise TraceError(
            f"{_WHERE}: valid is {valid.dtype} and holds {np.unique(valid.astype(str))[:4].tolist()}, expected True and False, or 1 "
            "and 0: a mask of the replayed rows, not lengths or weights"
        )
    return valid.astype(bool)


def _check_positions(position: Int64[np.ndarray, " rows"]) -> None:
    if len(position) and not 0 <= position.min() <= position.max() <= _MAX_POSITION:
        raise TraceError(
            f"{_WHERE}: position runs from {position.min()} to {position.max()}, expected 0 to {_MAX_POSITION} at replayed "
            "rows: count from the start of each sample, and mark padding by a negative sample id"
        )


def _positions(sample: Int64[np.ndarray, " rows"]) -> Int64[np.ndarray, " rows"]:
    """Return how many earlier rows belong to the same sample, for each row."""
    order = np.argsort(sample, kind="stable")
    ordered = sample[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] - 1)) if len(ordered) else order
    count = np.diff(np.append(starts, len(ordered)))
    found = np.empty(len(sample), np.int64)
    found[order] = np.arange(len(ordered)) - np.repeat(starts, count)
    return found


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
