"""The settings that every test runs under are really on."""

import os
import warnings

import numpy as np
import pytest
from hypothesis import settings
from jaxtyping import TypeCheckError

from moe_replay.routing import RowIndex


def test_warnings_are_errors():
    with pytest.raises(UserWarning, match="planted"):
        warnings.warn("planted", stacklevel=1)


def test_annotations_are_checked_at_calls():
    index = RowIndex.packed([3])
    with pytest.raises(TypeCheckError, match="fill"):
        index.gather(np.arange(3), fill="zero")


def test_annotations_are_checked_on_fields():
    with pytest.raises(TypeCheckError, match="rows"):
        RowIndex(rows=np.zeros(3, dtype=np.int32), num_rows=3, padded_lengths=(3,))


def test_an_int_is_accepted_where_a_float_is_annotated():
    assert RowIndex.packed([2]).gather(np.array([5, 7]), fill=0).tolist() == [5, 7]


def test_hypothesis_tries_the_same_examples_on_every_run():
    assert settings().derandomize


def test_a_process_computes_in_one_thread():
    assert os.environ["OMP_NUM_THREADS"] == "1"
