"""The auxiliary loss beside replay weighs the same in every layout, padding left out."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from moe_replay.megatron.ranks.replica import Replica
from moe_replay.routing import Routing
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


def _gradients(
    checkpoint: Path, case: Case, coeff: float, masked: bool
) -> tuple[dict[str, torch.Tensor], float | None]:
    """Return the gradient of two microbatches of each half of the samples, for any replicas.

    And this rank's part of the auxiliary loss itself.
    """
    actor = start_policy(checkpoint, case.layout, moe_aux_loss_coeff=coeff, **case.overrides)
    if not masked:
        actor._padding_mask = lambda *_: None
    replica = Replica.find(tuple(actor.routers), place=actor.place)
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
    gradient = actor.backward(microbatches, mean_loss, temperature=0.9, routing=Routing.REPLAY)
    return gradients(actor), gradient.balancing_loss


@cache
def alone(checkpoint: Path, coeff: float = COEFF) -> tuple[dict[str, torch.Tensor], float | None]:
    """Return the gradient and the auxiliary loss of a single process."""
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
    case, (expected, balance) = CASES[name], alone(checkpoint)
    found = run_ranks(_gradients, case.ranks, checkpoint, case, COEFF, True)
    for gradient, _ in found:
        assert error(gradient, expected) < BOUND
    # T16: what the metric adds up over all ranks.
    assert sum(part for _, part in found if part is not None) == pytest.approx(balance, rel=BOUND)


def test_auxiliary_loss_makes_up_much_of_the_gradient_compared(checkpoint: Path) -> None:
    without, nothing = alone(checkpoint, 0.0)
    assert error(without, alone(checkpoint)[0]) > 0.5
    assert nothing is None


def test_without_the_mask_megatrons_auxiliary_loss_depends_on_the_layout(checkpoint: Path) -> None:
    case = CASES["tp2"]
    for found, _ in run_ranks(_gradients, case.ranks, checkpoint, case, COEFF, False):
        assert error(found, alone(checkpoint)[0]) > 0.1
