"""The optimizer that a policy gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_replay.megatron.actor import MegatronActor
from moe_replay.recipe.sections.training import OptimizerSection
from moe_replay.routing import Routing
from moe_replay.testing.policies import mean_loss, pack, start_policy
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.samples import make_samples

SETTINGS = OptimizerSection(lr=1e-3, weight_decay=0.1)


def _groups(actor: MegatronActor) -> list[dict[str, Any]]:
    return [group for group in actor.optimizer.param_groups if group["params"]]


def _three_steps(
    checkpoint: Path, fused: bool | None, beta2: float
) -> tuple[list[bool | None], torch.Tensor]:
    settings = SETTINGS.model_copy(update={"beta2": beta2})
    actor = start_policy(checkpoint, settings=settings)
    chosen = [group["fused"] for group in _groups(actor)]
    for group in _groups(actor):
        group["fused"] = fused
    batches = pack(make_samples(6, seed=1))
    for _ in range(3):
        actor.update(batches, mean_loss, temperature=1.0, routing=Routing.LIVE)
    weights = [p.detach().flatten() for module in actor.modules for p in module.parameters()]
    return chosen, torch.cat(weights)


@pytest.mark.ranks
def test_adam_on_a_cpu_runs_as_one_call_and_learns_the_same(checkpoint: Path) -> None:
    chosen, fused = run_ranks(_three_steps, 1, checkpoint, True, 0.95)[0]
    _, apart = run_ranks(_three_steps, 1, checkpoint, None, 0.95)[0]
    _, other = run_ranks(_three_steps, 1, checkpoint, None, 0.9)[0]
    assert chosen
    assert all(chosen)
    # A gradient of rounding noise moves a weight by up to the learning rate, so the mean counts.
    assert (fused - apart).abs().mean() < 1e-7
    assert (other - apart).abs().mean() > 1e-6


def _bfloat16_choice(checkpoint: Path) -> list[tuple[bool | None, set[torch.dtype]]]:
    actor = start_policy(checkpoint, dtype=torch.bfloat16)
    return [(group["fused"], {p.dtype for p in group["params"]}) for group in _groups(actor)]


@pytest.mark.ranks
def test_adam_of_a_bfloat16_policy_moves_its_float32_weights_in_one_call(checkpoint: Path) -> None:
    choices = run_ranks(_bfloat16_choice, 1, checkpoint)[0]
    assert choices
    assert all(choice == (True, {torch.float32}) for choice in choices)
