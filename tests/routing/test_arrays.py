"""Foreign buffers are copied at the border; what nobody can write to is not."""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Callable

import numpy as np
import pytest
import torch

from moe_replay.routing import (
    Origin,
    RoutedModel,
    RoutingTrace,
    decode_trace,
    encode_trace,
    trace_from_payload,
)
from moe_replay.routing.arrays import kept, owned

MODEL = RoutedModel(moe_layers=(0, 1, 2), num_decoder_layers=3, num_experts=8, topk=2)
TOKENS = np.arange(40, dtype=np.int32)
ORIGIN = Origin.single(engine="x", engine_version="1", policy_version=0, num_rows=40)


def buffers() -> dict[str, np.ndarray]:
    """Return what an engine writes into, and will write into again."""
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((40, 3, 8)), axis=2)[:, :, :2].astype(np.uint8)
    return {"expert_ids": ids, "token_ids": TOKENS.copy(), "valid": np.arange(40) < 39}


def recorded(held: dict[str, np.ndarray]) -> RoutingTrace:
    return RoutingTrace.record(**held, layers=(0, 1, 2), num_experts=8, origin=ORIGIN)


def built(held: dict[str, np.ndarray]) -> RoutingTrace:
    made = recorded(held)
    return RoutingTrace(
        expert_ids=held["expert_ids"],
        valid=held["valid"],
        layers=(0, 1, 2),
        num_experts=8,
        token_digest=made.token_digest,
        origin=ORIGIN,
    )


def sliced(held: dict[str, np.ndarray]) -> RoutingTrace:
    """Build from read-only views of the buffers, while their owner still writes."""
    views = {name: array[:] for name, array in held.items()}
    for view in views.values():
        view.flags.writeable = False
    return built(views)


def of_tensors(held: dict[str, np.ndarray]) -> RoutingTrace:
    return recorded({name: torch.from_numpy(array) for name, array in held.items()})


def of_payload(held: dict[str, np.ndarray]) -> RoutingTrace:
    return trace_from_payload(
        held["expert_ids"][:39],
        token_ids=held["token_ids"],
        num_prompt_tokens=10,
        model=MODEL,
        origin=ORIGIN,
        where="a test",
    )


@pytest.mark.parametrize("make", [recorded, built, sliced, of_tensors, of_payload])
def test_e6_a_buffer_that_its_owner_reuses_changes_no_trace(
    make: Callable[[dict[str, np.ndarray]], RoutingTrace],
):
    held = buffers()
    trace = make(held)
    before = encode_trace(trace)
    for array in held.values():
        assert array.flags.writeable
        array[...] = array[::-1].copy()
    assert encode_trace(trace) == before
    # The control: the buffers hold something else now.
    assert encode_trace(make(held)) != before


def parts_of(trace: RoutingTrace) -> dict[str, RoutingTrace]:
    return {
        "itself": trace,
        "cropped": trace.crop(3, 20),
        "fewer layers": trace.select_layers((0, 2)),
        "decoded": decode_trace(encode_trace(trace)),
        "replaced": dataclasses.replace(trace, origin=ORIGIN),
    }


def test_e6_no_array_of_a_trace_can_be_written_to():
    for name, trace in parts_of(recorded(buffers())).items():
        for field in ("expert_ids", "valid", "token_digest"):
            array = getattr(trace, field)
            with pytest.raises(ValueError, match="read-only"):
                array[:1] = array[1:2]
            assert kept(array) is array, f"{name}: {field} would be copied again"


def test_e6_a_slice_of_a_trace_shares_its_memory():
    trace = recorded(buffers())
    assert np.shares_memory(trace.crop(3, 20).expert_ids, trace.expert_ids)
    assert np.shares_memory(dataclasses.replace(trace).expert_ids, trace.expert_ids)


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def test_e6_only_memory_that_nobody_writes_to_is_taken_without_a_copy(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(8))
    base = np.zeros(8, np.uint8)
    with path.open("r+b") as file:
        reading = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        writing = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_WRITE)
    taken = {
        "given away": owned(np.zeros(8, np.uint8)),
        "a slice of it": owned(np.zeros(8, np.uint8))[2:],
        "a view of it": owned(np.zeros(8, np.uint8).view(bool)),
        "bytes": np.frombuffer(bytes(8), np.uint8),
        "a view of bytes": np.frombuffer(memoryview(bytes(8))[2:], np.uint8),
        "a file mapped for reading": np.frombuffer(reading, np.uint8),
        "as numpy maps it": np.memmap(path, np.uint8, "r"),
    }
    copied = {
        "an array": np.zeros(8, np.uint8),
        "a read-only slice of one": read_only(base[2:]),
        "a bytearray": np.frombuffer(bytearray(8), np.uint8),
        "a read-only view of one": np.frombuffer(memoryview(bytearray(8)).toreadonly(), np.uint8),
        "a file mapped for writing": np.frombuffer(writing, np.uint8),
        "a private mapping": np.memmap(path, np.uint8, "c"),
        "a tensor": torch.zeros(8, dtype=torch.uint8).numpy(),
    }
    for name, array in taken.items():
        assert kept(array) is array, name
    for name, array in copied.items():
        ours = kept(array)
        assert not ours.flags.writeable and not np.shares_memory(ours, array), name
        assert kept(ours) is ours, name


def test_e6_memory_of_another_owner_cannot_be_given_away():
    with pytest.raises(AssertionError):
        owned(np.frombuffer(bytearray(8), np.uint8))
