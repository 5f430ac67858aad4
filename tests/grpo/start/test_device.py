"""What a recipe leaves to the device, decided where torch is."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

from moe_replay.errors import CheckpointError, UnsupportedError
from moe_replay.grpo.start.device import check_attention, on_this_device
from moe_replay.recipe.recipe import Recipe

from ..test_loop import run

Recipes = Callable[..., Recipe]


def test_float32_has_no_attention_beside_transformer_engine_and_all_else_has_one() -> None:
    with pytest.raises(UnsupportedError, match=r'set model\.dtype = "bfloat16"'):
        check_attention("float32", transformer_engine=True)
    check_attention("bfloat16", transformer_engine=True)
    check_attention("float32", transformer_engine=False)


def test_this_device_is_the_one_that_torch_finds(recipe: Recipes) -> None:
    expected = "bfloat16" if torch.cuda.is_available() else "float32"
    assert recipe().model.dtype == "auto"
    assert on_this_device(recipe()).model.dtype == expected


@pytest.mark.ranks
def test_a_run_keeps_the_format_that_it_began_with(recipe: Recipes) -> None:
    """The control: resumed as on another device, in another format, it is refused."""
    run(recipe(run__max_steps=1))
    position = json.loads(
        (recipe().run.output_dir / "checkpoints" / "step-000001" / "position.json").read_text()
    )
    assert position["identity"]["model.dtype"] == "float32"
    with pytest.raises(CheckpointError, match=r'model\.dtype: was "float32", is "bfloat16"'):
        run(recipe(run__max_steps=2).on_device("cuda"))
    run(recipe(run__max_steps=2, model__dtype="float32"))
