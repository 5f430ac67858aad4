"""Steps of several updates measure how far live routes drift from the replayed ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from moe_replay.recipe.recipe import Recipe
from moe_replay.testing.misrouting import one_row_late

from .guard.test_judging import LONG, one, wrong
from .test_loop import run

pytestmark = pytest.mark.ranks
Recipes = Callable[..., Recipe]
SEVERAL = {
    "batch__steps_per_generation": 2,
    "run__max_steps": 1,
    "rollout__dtype": "float32",
    "checkpoint__export": "false",
}
NAMES = [f"replay/{what}/update_{n}" for what in ("agreement", "flip_frac") for n in (1, 2)]


def drift(recipe: Recipe, **options: Any) -> list[float]:
    """Return agreement before the first and the second update, then flips."""
    (record,) = run(recipe, restart=True, **options)
    return [record[name] for name in NAMES]


@pytest.mark.parametrize("mode", ["R2", "R3"])
def test_updates_carry_live_routes_away(mode: str, recipe: Recipes) -> None:
    moved = drift(recipe(replay__router_replay_mode=mode, optimizer__lr=3e-2, **SEVERAL))
    assert moved[0] == 1.0 > moved[1]
    assert moved[2] == 0.0 < moved[3]
    # One flip changes one expert of a set, or more.
    assert moved[3] >= 1 - moved[1]
    still = drift(recipe(replay__router_replay_mode=mode, optimizer__lr=1e-12, **SEVERAL))
    assert still == [1.0, 1.0, 0.0, 0.0]


def test_one_update_a_step_and_live_routing_have_no_drift_to_measure(recipe: Recipes) -> None:
    for keys in (
        SEVERAL | {"batch__steps_per_generation": 1},
        SEVERAL | {"replay__router_replay_mode": "disabled"},
    ):
        (record,) = run(recipe(**keys), restart=True)
        assert not record.keys() & set(NAMES)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"tensor_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 1},
    ],
    ids=["dp2", "tp2", "pp2"],
)
def test_drift_does_not_depend_on_the_layout(sizes: dict[str, int], recipe: Recipes) -> None:
    moved = {**SEVERAL, "optimizer__lr": 3e-2}
    keys = {f"megatron__{name}": size for name, size in sizes.items()}
    alone = drift(recipe(**moved))
    assert drift(recipe(**moved, **keys), world_size=2) == pytest.approx(alone, abs=0.01)


def test_a_dropped_sample_is_no_drift(recipe: Recipes) -> None:
    keys = LONG | SEVERAL | {"replay__on_misaligned": "drop", "optimizer__lr": 1e-12}
    (record,) = run(recipe(**keys), make_engine=wrong(one_row_late, one))
    assert record["replay/dropped_samples"] == 1.0
    assert record["replay/agreement"] < 1.0
    assert [record[name] for name in NAMES] == [1.0, 1.0, 0.0, 0.0]
