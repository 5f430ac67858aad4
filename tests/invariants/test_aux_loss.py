"""The auxiliary loss beside replay weighs the same in every layout, padding left out."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from moe_replay.megatron.replica import Replica
from moe_replay.megatron.scorer import Routing
from moe_replay.testing.layouts import CASES, Case, coded_samples, layout, replica_share
from moe_replay.testing.policies import gradients, mean_loss, pack, start_policy
from moe_replay.testing.ranks import run_ranks

pytestmark = pytest.mark.ranks
LAYERS = tuple(range(1, 8))
COEFF = 5.0
BOUND = 1e-5
"""Relative; float32 reductions in another order."""
NAMES = (
    "tp2",
    "cp2",
    "ep2",
    "pp2",
    "tp2 cp2",
    "pp2 vpp2 tp2",
    "tp2 full recompute",
    "pp2 vpp2 moe recompute",
)


def _gradients(checkpoint: Path, case: Case, coeff: float, masked: bool) -> dict[str, torch.Tensor]:
    """Return the gradient of two microbatches of each half of the samples, whatever the number of replicas."""
    actor = start_policy(checkpoint, case.layout, moe_aux_loss_coeff=coeff, **case.overrides)
    if not masked:
        actor._padding_mask = lambda *_: None
    replica = Replica.find(tuple(actor.routers), place=actor.place, device=actor.device)
    samples = replica_share(coded_samples(LAYERS), replica)
    half = 4
    packed = [
        microbatch
        for start in range(0, len(samples), half)
        for microbatch in pack(
            samples[start : start + half], scorer=actor, max_tokens=1000, count=2
        )
    ]
    microbatches = [replace(m, key=key) for key, m in enumerate(packed)]
    actor.optimizer.step = lambda: (True, 0.0, 0)
    actor.update(microbatches, mean_loss, temperature=0.9, routing=Routing.REPLAY)
    return gradients(actor)


@cache
def alone(checkpoint: Path, coeff: float = COEFF) -> dict[str, torch.Tensor]:
    """Return the gradient of a single process."""
    return run_ranks(_gradients, 1, checkpoint, Case(layout=layout(), ranks=1), coeff, True)[0]


def error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest relative error of a parameter's gradient."""
    return max(
        float((found[name] - gradient).norm() / (gradient.norm() + 1e-12))
        for name, gradient in expected.items()
    )


@pytest.mark.parametrize("name", NAMES)
def test_auxiliary_loss_beside_replay_equals_that_of_a_single_process(
    checkpoint: Path, name: str
) -> None:
    case, expected = CASES[name], alone(checkpoint)
    for found in run_ranks(_gradients, case.ranks, checkpoint, case, COEFF, True):
        assert error(found, expected) < BOUND


def test_auxiliary_loss_makes_up_much_of_the_gradient_compared(checkpoint: Path) -> None:
    assert error(alone(checkpoint, 0.0), alone(checkpoint)) > 0.5


def test_without_the_mask_megatrons_auxiliary_loss_depends_on_the_layout(checkpoint: Path) -> None:
    case = CASES["tp2"]
    for found in run_ranks(_gradients, case.ranks, checkpoint, case, COEFF, False):
        assert error(found, alone(checkpoint)) > 0.1
