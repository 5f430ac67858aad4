"""Recipes that a plan refuses, because it would count them wrongly."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moe_replay.errors import UnsupportedError
from moe_replay.megatron.model import read_model_shape
from moe_replay.plan.machine import read_machine
from moe_replay.plan.options import check_options
from moe_replay.recipe.recipe import Recipe


def test_adapters_are_refused_and_whole_weights_are_not(recipe: Callable[..., Recipe]) -> None:
    machine = read_machine(["gpus=8x80GB"])
    with pytest.raises(UnsupportedError, match=r"lora\.rank = 8: the plan knows neither"):
        adapted = recipe(lora={"rank": 8})
        check_options(adapted, read_model_shape(adapted.model.path), machine)
