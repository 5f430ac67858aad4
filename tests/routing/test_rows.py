"""RowIndex by hand, and as a property: every global row lands once, where its token is."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_replay.errors import TraceError
from moe_replay.routing import RowIndex

PARTITIONS = ("zigzag", "contiguous")
lengths_lists = st.lists(st.integers(1, 13), min_size=1, max_size=6)


def packed_ranks(lengths, cp, tp, partition, pad_multiple):
    for cp_rank, tp_rank in product(range(cp), range(tp)):
        whole = RowIndex.packed(
            lengths,
            cp_size=cp,
            cp_rank=cp_rank,
            cp_partition=partition,
            pad_multiple=pad_multiple,
        )
        yield whole.sequence_shard(tp, tp_rank)


def route_of_row(lengths) -> np.ndarray:
    """Give every global row a route that spells (sample, position): what lands is what it says."""
    return np.array([[i, p] for i, length in enumerate(lengths) for p in range(length)])


def test_packed_lays_sequences_end_to_end():
    index = RowIndex.packed([3, 2])
    assert index.rows.tolist() == [0, 1, 2, 3, 4]
    assert index.padded_lengths == (3, 2)


def test_packed_pads_the_local_rows_behind_the_last_sequence():
    index = RowIndex.packed([3, 2], pad_multiple=4)
    assert index.rows.tolist() == [0, 1, 2, 3, 4, -1, -1, -1]
    assert index.padded_lengths == (3, 5)


@pytest.mark.parametrize(
    ("rank", "rows"),
    [
        # Sequence 0 is padded to 4: chunks [0][1][2][-]; sequence 1 to 8: [3 4][5 6][7 8][9 -].
        (0, [0, -1, 3, 4, 9, -1]),
        (1, [1, 2, 5, 6, 7, 8]),
    ],
)
def test_packed_zigzag_gives_each_rank_one_early_and_one_late_chunk(rank, rows):
    index = RowIndex.packed([3, 7], cp_size=2, cp_rank=rank)
    assert index.rows.tolist() == rows
    assert index.padded_lengths == (4, 8)


@pytest.mark.parametrize(("rank", "rows"), [(0, [0, 1, 3, 4, 5, 6]), (1, [2, -1, 7, 8, 9, -1])])
def test_packed_contiguous_cuts_each_sequence_in_order(rank, rows):
    index = RowIndex.packed([3, 7], cp_size=2, cp_rank=rank, cp_partition="contiguous")
    assert index.rows.tolist() == rows


@given(
    lengths_lists,
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from(PARTITIONS),
    st.sampled_from([1, 3]),
)
def test_packed_rows_land_exactly_once_over_all_ranks(lengths, cp, tp, partition, extra):
    shards = list(packed_ranks(lengths, cp, tp, partition, tp * extra))
    assert len({len(shard.rows) for shard in shards}) == 1
    landed = np.concatenate([shard.rows[shard.is_token] for shard in shards])
    assert sorted(landed.tolist()) == list(range(sum(lengths)))


@given(
    lengths_lists,
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2]),
    st.sampled_from(PARTITIONS),
)
def test_packed_routes_land_with_the_rows_they_name(lengths, cp, tp, partition):
    routes = route_of_row(lengths)
    tokens = np.arange(sum(lengths)) * 10
    starts = np.cumsum([0, *lengths])
    for shard in packed_ranks(lengths, cp, tp, partition, tp):
        local_routes = shard.gather(routes, fill=-1)
        local_tokens = shard.gather(tokens, fill=-1)
        for (sample, position), token in zip(local_routes, local_tokens, strict=True):
            expected = -1 if sample < 0 else (starts[sample] + position) * 10
            assert token == expected


@given(
    lengths_lists, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.sampled_from(PARTITIONS)
)
def test_scatter_undoes_gather_over_all_ranks(lengths, cp, tp, partition):
    values = np.arange(sum(lengths)) + 7
    out = np.zeros_like(values)
    for shard in packed_ranks(lengths, cp, tp, partition, tp):
        shard.scatter(shard.gather(values, fill=-1), out)
    assert out.tolist() == values.tolist()


def test_padded_is_sequence_major():
    index = RowIndex.padded([3, 2], max_length=4)
    assert index.rows.tolist() == [0, 3, 1, 4, 2, -1, -1, -1]


def test_padded_left_puts_padding_first():
    index = RowIndex.padded([3, 2], max_length=4, side="left")
    assert index.rows.tolist() == [-1, -1, 0, -1, 1, 3, 2, 4]


@pytest.mark.parametrize(
    ("partition", "rows"),
    [("zigzag", [[0, 3, -1, -1], [1, 4, 2, -1]]), ("contiguous", [[0, 3, 1, 4], [2, -1, -1, -1]])],
)
def test_padded_cuts_positions_for_context_parallelism(partition, rows):
    found = [
        RowIndex.padded(
            [3, 2], max_length=4, cp_size=2, cp_rank=rank, cp_partition=partition
        ).rows.tolist()
        for rank in (0, 1)
    ]
    assert found == rows


@given(
    lengths_lists,
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2]),
    st.sampled_from(PARTITIONS),
    st.sampled_from(["left", "right"]),
)
def test_padded_rows_land_exactly_once_over_all_ranks(lengths, cp, tp, partition, side):
    width = 16
    landed = []
    for cp_rank, tp_rank in product(range(cp), range(tp)):
        shard = RowIndex.padded(
            lengths,
            max_length=width,
            side=side,
            cp_size=cp,
            cp_rank=cp_rank,
            cp_partition=partition,
        ).sequence_shard(tp, tp_rank)
        landed += shard.rows[shard.is_token].tolist()
    assert sorted(landed) == list(range(sum(lengths)))


def test_two_partitions_place_rows_differently():
    zigzag, contiguous = (
        RowIndex.packed([8], cp_size=2, cp_partition=partition).rows.tolist()
        for partition in PARTITIONS
    )
    assert zigzag == [0, 1, 6, 7]
    assert contiguous == [0, 1, 2, 3]


def test_gather_refuses_values_of_another_batch():
    with pytest.raises(TraceError, match="values have 4 rows, the concatenated batch has 5"):
        RowIndex.packed([3, 2]).gather(np.zeros(4), fill=0)


def test_gather_fills_padding_of_every_trailing_dim():
    local = RowIndex.packed([2], pad_multiple=3).gather(np.ones((2, 2), dtype=np.uint8), fill=9)
    assert local.tolist() == [[1, 1], [1, 1], [9, 9]]


def test_gather_leaves_its_argument_alone():
    values = np.ones(2)
    RowIndex.packed([2], pad_multiple=3).gather(values, fill=9)
    assert values.tolist() == [1, 1]


def test_scatter_refuses_rows_of_another_rank():
    with pytest.raises(TraceError, match="got 4 local and 5 global rows, expected 5 and 5"):
        RowIndex.packed([3, 2]).scatter(np.zeros(4), np.zeros(5))


def test_sequence_shard_refuses_rows_that_do_not_divide():
    with pytest.raises(TraceError, match="5 local positions do not divide by tp_size 2"):
        RowIndex.packed([3, 2]).sequence_shard(2, 0)


def test_sequence_shard_keeps_the_samples_of_a_position_together():
    """Two samples of three positions are six rows, but half a position cannot be cut off."""
    with pytest.raises(TraceError, match="3 local positions do not divide by tp_size 2"):
        RowIndex.padded([3, 2], max_length=3).sequence_shard(2, 0)
    shard = RowIndex.padded([3, 2], max_length=4).sequence_shard(2, 1)
    assert shard.rows.tolist() == [2, -1, -1, -1]
    with pytest.raises(TraceError, match="2 local positions do not divide by tp_size 4"):
        shard.sequence_shard(4, 0)


@pytest.mark.parametrize("lengths", [[], [3, 0]])
def test_packed_refuses_empty_sequences(lengths):
    with pytest.raises(TraceError, match="at least one sequence length, and each at least 1"):
        RowIndex.packed(lengths)


@pytest.mark.parametrize("rank", [-1, 2])
def test_packed_refuses_a_rank_outside_the_axis(rank):
    with pytest.raises(TraceError, match=f"cp_rank {rank} lies outside"):
        RowIndex.packed([4], cp_size=2, cp_rank=rank)


@pytest.mark.parametrize(("width", "cp"), [(2, 1), (6, 2)])
def test_padded_refuses_a_width_that_does_not_fit(width, cp):
    with pytest.raises(TraceError, match=f"max_length {width} must be a multiple"):
        RowIndex.padded([3], max_length=width, cp_size=cp)
