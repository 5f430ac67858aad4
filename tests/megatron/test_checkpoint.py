"""A checkpoint written in one layout continues in another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_replay.megatron.actor import MegatronActor
from moe_replay.megatron.checkpoint import CheckpointFolder, RunPosition
from moe_replay.megatron.layout import ParallelLayout
from moe_replay.megatron.replica import Replica
from moe_replay.megatron.scorer import Routing
from moe_replay.megatron.weights import export_hf_weights
from moe_replay.testing.layouts import SEED, coded_samples, layout, replica_share
from moe_replay.testing.policies import mean_loss, pack, start_policy
from moe_replay.testing.ranks import run_ranks

pytestmark = pytest.mark.ranks
LAYERS = (0, 1, 2, 3)
LAYOUTS: dict[str, tuple[ParallelLayout, int]] = {
    "one": (layout(), 1),
    "dp2": (layout(), 2),
    "tp2": (layout(tp=2), 2),
    "pp2": (layout(pp=2), 2),
    "pp2 vpp2": (layout(pp=2, vpp=2), 2),
    "ep2": (layout(ep=2), 2),
    "tp2 ep2": (layout(tp=2, ep=2, etp=1), 2),
    "pp2 ep2": (layout(pp=2, ep=2), 4),
}


def update(actor: MegatronActor) -> float:
    """Take one replayed step."""
    replica = Replica.find(tuple(actor.routers), place=actor.place, device=actor.device)
    samples = replica_share(coded_samples(LAYERS), replica)
    batches = pack(samples, scorer=actor, count=4)
    result = actor.update(batches, mean_loss, temperature=1.0, routing=Routing.REPLAY)
    return result.grad_norm


def weights_of(actor: MegatronActor) -> dict[str, torch.Tensor]:
    return dict(export_hf_weights(actor.modules))


def save_and_go_on(checkpoint: Path, where: ParallelLayout, folder: Path) -> Any:
    """Return the weights that were saved, and what the next step made of them."""
    actor = start_policy(checkpoint, where)
    update(actor)
    update(actor)
    scheduler = actor.scheduler.state_dict()
    at = RunPosition(step=2, policy_version=2, next_prompt=0, fingerprint="x", scheduler=scheduler)
    CheckpointFolder(folder, save_total_limit=1).save(actor, at)
    saved = weights_of(actor)
    norm = update(actor)
    return saved, norm, weights_of(actor)


def load_and_go_on(checkpoint: Path, where: ParallelLayout, folder: Path) -> Any:
    actor = start_policy(checkpoint, where)
    CheckpointFolder(folder, save_total_limit=1).load(actor, 2)
    loaded = weights_of(actor)
    norm = update(actor)
    return loaded, norm, weights_of(actor)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("one", "one"),
        ("one", "dp2"),
        ("one", "tp2"),
        ("tp2", "pp2 vpp2"),
        ("pp2", "one"),
        ("pp2 vpp2", "tp2"),
        ("ep2", "pp2 ep2"),
        ("tp2 ep2", "ep2"),
        ("one", "ep2"),
        ("ep2", "tp2"),
    ],
)
def test_a_run_goes_on_in_another_layout(
    checkpoint: Path, tmp_path: Path, first: str, then: str
) -> None:
    print("seed", SEED)
    where, ranks = LAYOUTS[first]
    saved, norm, after = run_ranks(save_and_go_on, ranks, checkpoint, where, tmp_path / "c")[0]
    where, ranks = LAYOUTS[then]
    for loaded, next_norm, went_on in run_ranks(
        load_and_go_on, ranks, checkpoint, where, tmp_path / "c"
    ):
        assert all(torch.equal(loaded[name], value) for name, value in saved.items())
        assert next_norm == pytest.approx(norm, rel=1e-5)
        moved = torch.cat([(after[n] - saved[n]).flatten() for n in saved]).norm()
        apart = torch.cat([(went_on[n] - after[n]).flatten() for n in saved]).norm()
        # Adam moves a weight by about the learning rate whatever its gradient's size, so noise in tiny gradients shows.
        assert apart < 1e-3 * moved
