"""Layers of pipeline stages, told in advance: those that the ranks of tests/defects then build."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_replay.megatron.model import read_model_shape, transformer_config
from moe_replay.megatron.stages import stage_layers
from moe_replay.testing.layouts import layout
from moe_replay.testing.tiny_models import write_tiny_checkpoint

STAGES = {
    "one": (layout(), [[*range(8)]]),
    "even": (layout(pp=2), [[0, 1, 2, 3], [4, 5, 6, 7]]),
    "interleaved": (layout(pp=2, vpp=2), [[0, 1, 4, 5], [2, 3, 6, 7]]),
    "first": (layout(pp=2, first=3), [[0, 1, 2], [3, 4, 5, 6, 7]]),
    "last": (layout(pp=2, last=2), [[0, 1, 2, 3, 4, 5], [6, 7]]),
    "custom": (layout(pp=2, stages="Ett|t*6L"), [[0, 1], [2, 3, 4, 5, 6, 7]]),
    "custom, interleaved": (
        layout(pp=2, vpp=2, stages="Et|t*3|t*2|t*2L"),
        [[0, 4, 5], [1, 2, 3, 6, 7]],
    ),
}


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of eight layers."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("eight"), num_hidden_layers=8)


@pytest.mark.parametrize("name", STAGES)
def test_stages_hold_the_layers_that_the_layout_says(name: str, eight: Path) -> None:
    where, expected = STAGES[name]
    found = stage_layers(transformer_config(read_model_shape(eight), where))
    assert [list(layers) for layers in found] == expected
