"""The rolling digest: prefixes, and cropping without the tokens."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moe_replay.routing.digest import (
    crop_digest,
    digest_tokens,
    first_difference,
    num_different_tokens,
)

tokens = st.lists(st.integers(0, 200_000), min_size=1, max_size=40).map(np.array)


@given(tokens)
def test_digest_of_a_row_depends_on_earlier_rows_alone(ids):
    whole = digest_tokens(ids)
    assert all(whole[row] == digest_tokens(ids[: row + 1])[row] for row in range(len(ids)))


@given(tokens, st.data())
def test_crop_digest_is_the_digest_of_the_crop(ids, data):
    start = data.draw(st.integers(0, len(ids)))
    stop = data.draw(st.integers(start, len(ids)))
    cropped = crop_digest(digest_tokens(ids), start, stop)
    assert cropped.tolist() == digest_tokens(ids[start:stop]).tolist()


@given(tokens, st.data())
def test_digest_differs_from_a_changed_token_on(ids, data):
    row = data.draw(st.integers(0, len(ids) - 1))
    changed = ids.copy()
    changed[row] += 1
    assert first_difference(digest_tokens(ids), digest_tokens(changed)) == row


@given(tokens)
def test_first_difference_of_equal_digests_is_none(ids):
    assert first_difference(digest_tokens(ids), digest_tokens(ids)) is None


def test_digest_sees_a_swap_of_neighbours():
    assert first_difference(digest_tokens(np.array([5, 7])), digest_tokens(np.array([7, 5]))) == 0


def test_digest_is_the_same_for_every_integer_width():
    wide = digest_tokens(np.array([1, 70_000, 3], dtype=np.int64))
    assert digest_tokens(np.array([1, 70_000, 3], dtype=np.int32)).tolist() == wide.tolist()


@given(tokens, st.data())
def test_num_different_tokens_counts_those_of_the_rows(ids, data):
    rows = np.array(data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))))
    assert num_different_tokens(digest_tokens(ids), rows) == len(set(ids[rows].tolist()))
