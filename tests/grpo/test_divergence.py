"""Weights that overflow are named, and cost no checkpoint."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moe_replay.engines.types import Engine
from moe_replay.errors import DivergedError
from moe_replay.grpo.engines import recipe_engine
from moe_replay.megatron.finite import check_optimizer, check_weights
from moe_replay.megatron.ranks.messages import all_ranks
from moe_replay.recipe.recipe import Recipe
from moe_replay.testing.layouts import layout
from moe_replay.testing.policies import start_policy
from moe_replay.testing.ranks import run_ranks

from .test_loop import metrics_of, run

pytestmark = pytest.mark.ranks
Recipes = Callable[..., Recipe]


def never_pushed(recipe: Recipe, device: torch.device) -> Engine:
    """Return the recipe's engine, which takes the weights of a checkpoint but no others."""
    engine = recipe_engine(recipe, device)
    load = engine.load_weights

    def load_weights(weights: object, *, policy_version: int) -> None:
        assert policy_version < 2, "weights of a diverged policy were pushed"
        load(weights, policy_version=policy_version)  # pyrefly: ignore

    engine.load_weights = load_weights
    return engine


@pytest.mark.parametrize("world_size", [1, 2])
def test_r6_weights_that_overflow_are_neither_pushed_nor_saved(
    world_size: int, recipe: Recipes
) -> None:
    calm = recipe(run__max_steps=1, checkpoint__save_total_limit=1)
    before = run(calm, world_size=world_size)
    wild = recipe(run__max_steps=3, checkpoint__save_total_limit=1, optimizer__lr=1e30)
    for _ in range(2):
        with pytest.raises(
            DivergedError, match=r"too large to compute with: .*Lower optimizer\.lr"
        ):
            run(
                wild,
                world_size=world_size,
                allow_changed=["optimizer.lr"],
                make_engine=never_pushed,
            )
        saved = (calm.run.output_dir / "checkpoints").iterdir()
        assert [path.name for path in saved] == ["step-000001"]
        assert metrics_of(calm) == before


def test_r6_one_bad_number_on_one_rank_is_named_on_all(workspace) -> None:
    def check(spoil: str) -> str:
        actor = start_policy(workspace / "model", layout())
        ranks = all_ranks()
        check_weights(actor.modules, ranks)
        check_optimizer(actor.optimizer, ranks)
        with torch.no_grad():
            if torch.distributed.get_rank() == 1 and spoil == "weight":
                dict(actor.modules[0].named_parameters())["output_layer.weight"][3, 5] = float(
                    "nan"
                )
            for part in getattr(actor.optimizer, "chained_optimizers", [actor.optimizer]):
                for weight in part.optimizer.param_groups[0]["params"][:1]:
                    state = torch.zeros_like(weight)
                    if torch.distributed.get_rank() == 1 and spoil == "moment":
                        state[0] = float("inf")
                    part.optimizer.state[weight]["exp_avg_sq"] = state
        with pytest.raises(DivergedError) as caught:
            check_weights(actor.modules, ranks)
            check_optimizer(actor.optimizer, ranks)
        return str(caught.value)

    for said in run_ranks(check, 2, "weight"):
        assert "weights of rank 1" in said and "output_layer.weight." in said
    for said in run_ranks(check, 2, "moment"):
        assert "optimizer state of rank 1" in said and "exp_avg_sq" in said
