"""Messages between ranks of one job, over the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from moe_replay.errors import RankError
from moe_replay.megatron.ranks import messages
from moe_replay.megatron.ranks.messages import HostGroup, all_ranks, forget_groups
from moe_replay.testing.ranks import run_ranks

pytestmark = pytest.mark.ranks


@dataclass(frozen=True, slots=True)
class Plain:
    """A value with arrays and bytes in it."""

    ids: np.ndarray
    text: str
    payload: bytes


def _gather(value_of_rank: dict[int, object]) -> list[object]:
    return all_ranks().gather(value_of_rank[dist.get_rank()])


def test_gather_returns_values_of_different_length_in_rank_order() -> None:
    values = {0: {"a": [1, 2]}, 1: {"b": "a much longer value, with ünicode"}, 2: ()}
    for gathered in run_ranks(_gather, 3, values):
        assert gathered == [values[0], values[1], values[2]]


def test_gather_keeps_floats_to_the_last_bit() -> None:
    values = {0: 0.1 + 0.2, 1: 1e-310}
    assert run_ranks(_gather, 2, values)[0] == [0.1 + 0.2, 1e-310]


def test_gather_takes_arrays_and_bytes() -> None:
    ids = np.array([[3, 511]], dtype=np.uint16)
    values = {0: Plain(ids, "ü", b"\x00\xff"), 1: None}
    for plain, nothing in run_ranks(_gather, 2, values):
        assert nothing is None
        assert (plain.text, plain.payload) == ("ü", b"\x00\xff")
        assert plain.ids.dtype == np.uint16 and plain.ids.tolist() == [[3, 511]]


def test_one_process_alone_is_a_group_of_one() -> None:
    alone = all_ranks()
    assert (alone.size, alone.rank, alone.gather("it"), alone.first("bad")) == (
        1,
        0,
        ["it"],
        (0, "bad"),
    )
    assert alone.gather_items_to_first([1, 2], lambda _: 1) == [[1, 2]]


def _beside_a_device() -> tuple[list[str], str, float, bool]:
    """Talk as beside a device's world: a stand-in says that this world is not gloo."""
    real, dist.get_backend = dist.get_backend, lambda *_: "nccl"
    try:
        group = all_ranks().group
        again = all_ranks().group
        said = all_ranks().gather(f"from {dist.get_rank()}")
    finally:
        dist.get_backend = real
    assert group is not None and group is not dist.group.WORLD and group is again
    limit = group._get_backend(messages.torch.device("cpu")).options._timeout
    forget_groups()
    return said, real(group), limit.total_seconds(), messages._beside.cache_info().currsize == 0


def test_e9_a_world_of_devices_gets_one_host_group_with_a_long_limit() -> None:
    for said, backend, limit_s, is_forgotten in run_ranks(_beside_a_device, 2):
        assert said == ["from 0", "from 1"]
        assert backend == "gloo"
        # NCCL waits for ten minutes, and one rank may sample for hours.
        assert limit_s == messages.WAIT_LIMIT.total_seconds() >= 12 * 3600
        assert is_forgotten


def _in_pairs() -> tuple[list[int], list[list[int]]]:
    rank = dist.get_rank()
    pairs = [[0, 1], [2, 3]]
    group, pair = HostGroup.own_part(pairs, name="pair"), pairs[rank // 2]
    assert group.name == f"pair {rank // 2}"
    outgoing = [np.full(rank + peer, rank, dtype=np.uint8) for peer in pair]
    received = group.exchange(outgoing, [rank + peer for peer in pair])
    return group.gather(rank), [part.tolist() for part in received]


def test_parts_of_the_world_talk_apart_and_exchange_unequal_bytes() -> None:
    assert run_ranks(_in_pairs, 4) == [
        ([0, 1], [[], [1]]),
        ([0, 1], [[0], [1, 1]]),
        ([2, 3], [[2] * 4, [3] * 5]),
        ([2, 3], [[2] * 5, [3] * 6]),
    ]


def _rounds(to_first: bool, limit: int) -> tuple[Any, int, int]:
    """Send lists of different lengths; return what came, and the longest of the messages."""
    messages.PIECE_BYTES = limit
    sizes: list[int] = []
    name = "gather_object" if to_first else "all_gather_object"
    real: Callable[..., None] = getattr(dist, name)

    def spy(*args: Any, **kwargs: Any) -> None:
        sent = args[0] if to_first else args[1]
        if isinstance(sent, list):
            sizes.append(sum(map(len, sent)))
        real(*args, **kwargs)

    setattr(dist, name, spy)
    group, rank = all_ranks(), dist.get_rank()
    items = [f"{rank}:{number}".ljust(40) for number in range(3 * rank)]
    got = (group.gather_items_to_first if to_first else group.gather_items)(items, len)
    return [[item.strip() for item in part] for part in got], len(sizes), max(sizes)


@pytest.mark.parametrize("to_first", [True, False])
def test_e9_long_messages_go_in_pieces_of_bounded_size(to_first: bool) -> None:
    everything = [[], ["1:0", "1:1", "1:2"], [f"2:{n}" for n in range(6)]]
    # Three ranks share 240 bytes: 80 each, two items of 40.
    for rank, (got, rounds, longest) in enumerate(run_ranks(_rounds, 3, to_first, 240)):
        assert got == (everything if rank == 0 or not to_first else [])
        assert (rounds, longest) == (3, 0 if rank == 0 else 80)
    # Control: a limit that fits all is one message; an item above it goes alone.
    assert [rounds for _, rounds, _ in run_ranks(_rounds, 3, to_first, 1 << 20)] == [1, 1, 1]
    assert [rounds for _, rounds, _ in run_ranks(_rounds, 3, to_first, 30)] == [6, 6, 6]


def _said_by_the_one_that_is_left(is_gone: bool) -> str:
    """Return what rank 0 raises when rank 1 leaves, or stays without a word."""
    pair = HostGroup.own_part([[2], [0, 1]], name="replica")
    said = ""
    if dist.get_rank() == 0:
        if not is_gone:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=0.2), pair.group)
        with pytest.raises(RankError) as caught:
            pair.gather("here")
        said = str(caught.value)
    if not is_gone:
        dist.barrier()
    elif dist.get_rank() == 1:
        dist.destroy_process_group()
    return said


def test_a_rank_that_ended_is_told_from_one_that_is_silent() -> None:
    gone, _, _ = run_ranks(_said_by_the_one_that_is_left, 3, True)
    silent, _, _ = run_ranks(_said_by_the_one_that_is_left, 3, False)
    for said in (gone, silent):
        assert said.startswith("rank 0 of 2 (replica 1) lost the others: ")
    assert "has ended" in gone and "silent" not in gone
    assert "was silent for 0:00:00.2" in silent and "has ended" not in silent
