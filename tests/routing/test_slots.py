"""Planes of slots: there and back, sorted by a network, repeats found."""

import itertools

import numpy as np
import pytest

from moe_replay.routing.slots import (
    CHUNK_SLOTS,
    chunk_rows,
    from_planes,
    repeating_sets,
    row_chunks,
    sort_planes,
    to_planes,
)

IDS = np.array([[[7, 2], [1, 9]], [[5, 4], [3, 8]]], dtype=np.uint8)


def test_to_planes_gathers_each_slot_row_by_row():
    assert to_planes(IDS).tolist() == [[7, 1, 5, 3], [2, 9, 4, 8]]


def test_from_planes_undoes_to_planes():
    back = np.zeros_like(IDS)
    from_planes(to_planes(IDS), back)
    assert back.tolist() == IDS.tolist()


@pytest.mark.parametrize("num_rows", [1, 2])
def test_repeating_sets_leaves_the_routes_as_they_are(num_rows):
    """The planes of a single set have its own layout, so that a view would pass for a copy."""
    ids = np.tile(np.array([[[7, 2, 9, 4]]], dtype=np.uint8), (num_rows, 1, 1))
    repeating_sets(ids)
    assert ids.tolist() == [[[7, 2, 9, 4]]] * num_rows


@pytest.mark.parametrize("width", range(1, 11))
def test_sort_planes_sorts_every_pattern_of_zeros_and_ones(width):
    """A network that sorts all zeros and ones sorts everything (Knuth 5.3.4, theorem Z)."""
    patterns = np.array(list(itertools.product([0, 1], repeat=width)), dtype=np.uint8)
    ordered = np.stack(sort_planes(np.ascontiguousarray(patterns.T)))
    assert ordered.T.tolist() == [sorted(pattern) for pattern in patterns.tolist()]


@pytest.mark.parametrize("width", [22, 64, 65, 130])
def test_sort_planes_sorts_wide_sets(width):
    planes = np.random.default_rng(width).integers(0, 60_000, (width, 50)).astype(np.uint16)
    expected = [sorted(column) for column in planes.T.tolist()]
    assert np.stack(sort_planes(planes)).T.tolist() == expected


def test_repeating_sets_finds_a_repeat_in_any_two_slots():
    for first, second in itertools.combinations(range(8), 2):
        ids = np.tile(np.arange(8, dtype=np.uint8), (3, 2, 1))
        ids[1, 1, second] = ids[1, 1, first]
        assert np.argwhere(repeating_sets(ids)).tolist() == [[1, 1]]


def test_repeating_sets_finds_none_where_there_is_none():
    assert not repeating_sets(IDS).any()


@pytest.mark.parametrize("shape", [(4, 3, 1), (1, 1, 1), (0, 2, 4), (5, 1, 6)])
def test_repeating_sets_finds_none_in_increasing_sets(shape):
    ids = np.broadcast_to(np.arange(shape[2], dtype=np.uint8), shape)
    assert repeating_sets(ids).tolist() == np.zeros(shape[:2], dtype=bool).tolist()


@pytest.mark.parametrize("place", [(0, 0), (1, 2), (4, 1)])
def test_repeating_sets_finds_the_one_repeat_among_increasing_sets(place):
    ids = np.tile(np.array([2, 5, 7, 9], dtype=np.uint8), (5, 3, 1))
    ids[place] = [2, 5, 5, 9]
    assert np.argwhere(repeating_sets(ids)).tolist() == [list(place)]


@pytest.mark.parametrize(
    ("layers", "topk", "rows"), [(48, 8, 1365), (1, 1, CHUNK_SLOTS), (1000, 1000, 1)]
)
def test_chunk_rows_fills_a_chunk_and_holds_at_least_a_row(layers, topk, rows):
    assert chunk_rows(layers, topk) == rows


def test_row_chunks_covers_every_row_once():
    chunks = list(row_chunks(3000, 48, 8))
    assert [(rows.start, rows.stop) for rows in chunks] == [(0, 1365), (1365, 2730), (2730, 3000)]


def test_row_chunks_of_no_rows_is_empty():
    assert list(row_chunks(0, 48, 8)) == []
