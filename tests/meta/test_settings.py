"""The settings that every test runs under are really on."""

import ast
import importlib
import os
import warnings

import numpy as np
import pytest
from hypothesis import settings
from jaxtyping import TypeCheckError

from moe_replay.routing import Coverage, RowIndex


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


def test_a_wrong_shape_is_refused_in_the_core():
    with pytest.raises(TypeCheckError, match="valid"):
        Coverage.of_rows(np.ones((2, 2), dtype=bool), prompt_length=1)


def test_every_module_of_the_core_is_loaded_with_its_annotations(package):
    """The core imports their names for type checkers only; the tests load it as one does."""
    missing, found = [], 0
    for path, tree in package.items():
        module_name = f"moe_replay.{path.removesuffix('.py').replace('/', '.')}"
        imports = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        names = [a.name for n in imports if n.module == "jaxtyping" for a in n.names]
        if path.startswith("routing/") and names:
            module = importlib.import_module(module_name)
            missing += [f"{path}: {name}" for name in names if not hasattr(module, name)]
            found += 1
    assert missing == []
    assert found > 5


def test_an_int_is_accepted_where_a_float_is_annotated():
    assert RowIndex.packed([2]).gather(np.array([5, 7]), fill=0).tolist() == [5, 7]


def test_hypothesis_tries_the_same_examples_on_every_run():
    assert settings().derandomize


def test_a_process_computes_in_one_thread():
    assert os.environ["OMP_NUM_THREADS"] == "1"
