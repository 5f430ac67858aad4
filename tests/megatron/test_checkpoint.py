"""A checkpoint written in one layout continues in another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_replay.megatron.actor import MegatronActor
from moe_replay.megatron.checkpoint import CheckpointFolder, RunPosition
from moe_replay.megatron.chunks import unwrap
from moe_replay.megatron.layout import ParallelLayout
from moe_replay.megatron.ranks.replica import Replica
from moe_replay.megatron.weights import export_hf_weights
from moe_replay.routing import Routing
from moe_replay.testing.layouts import SEED, coded_samples, layout, replica_share
from moe_replay.testing.policies import mean_loss, pack, start_policy
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.tiny_models import write_tiny_checkpoint

pytestmark = pytest.mark.ranks
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
    replica = Replica.find(tuple(actor.routers), place=actor.place)
    layers = unwrap(actor.modules[0]).model_shape.moe_layers
    samples = replica_share(coded_samples(layers), replica)
    batches = pack(samples, scorer=actor, count=4)
    result = actor.update(batches, mean_loss, temperature=1.0, routing=Routing.REPLAY)
    return result.norm


def weights_of(actor: MegatronActor) -> dict[str, torch.Tensor]:
    return dict(export_hf_weights(actor.modules))


def save_and_go_on(checkpoint: Path, where: ParallelLayout, folder: Path) -> Any:
    """Return the weights that were saved, and what the next step made of them."""
    actor = start_policy(checkpoint, where)
    update(actor)
    update(actor)
    scheduler = actor.scheduler.state_dict()
    at = RunPosition(step=2, policy_version=2, next_prompt=0, identity={}, scheduler=scheduler)
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


def assert_goes_on(checkpoint: Path, folder: Path, first: str, then: str) -> None:
    """Save in the layout ``first``, load in ``then``, and compare with what ``first`` does next."""
    print("seed", SEED)
    where, ranks = LAYOUTS[first]
    saved, norm, after = run_ranks(save_and_go_on, ranks, checkpoint, where, folder)[0]
    where, ranks = LAYOUTS[then]
    for loaded, next_norm, went_on in run_ranks(load_and_go_on, ranks, checkpoint, where, folder):
        assert all(torch.equal(loaded[name], value) for name, value in saved.items())
        assert next_norm == pytest.approx(norm, rel=1e-5)
        moved = torch.cat([(after[n] - saved[n]).flatten() for n in saved]).norm()
        apart = torch.cat([(went_on[n] - after[n]).flatten() for n in saved]).norm()
        # Adam moves a weight by about the learning rate whatever its gradient's size, so noise in
        # tiny gradients shows.
        assert apart < 1e-3 * moved


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
    assert_goes_on(checkpoint, tmp_path / "c", first, then)


@pytest.mark.parametrize(
    ("family", "first", "then"), [("minimax_m2", "tp2", "one"), ("gpt_oss", "one", "ep2")]
)
def test_norms_over_all_heads_and_sinks_and_biases_go_on_in_another_layout(
    tmp_path: Path, family: str, first: str, then: str
) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path / "model", family, num_hidden_layers=2)
    assert_goes_on(checkpoint, tmp_path / "c", first, then)


@pytest.fixture(scope="module")
def dense_ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return checkpoints with two dense layers at an end, so that a stage has no expert."""
    return {
        end: write_tiny_checkpoint(tmp_path_factory.mktemp(end), mlp_only_layers=layers)
        for end, layers in (("first", [0, 1]), ("last", [2, 3]))
    }


@pytest.mark.parametrize(
    ("dense", "first", "then"),
    [
        ("first", "pp2", "pp2"),
        ("first", "pp2 ep2", "one"),
        ("first", "ep2", "pp2"),
        ("last", "pp2", "pp2 ep2"),
    ],
)
def test_t6_a_run_with_a_stage_of_dense_layers_is_saved_and_goes_on(
    dense_ends: dict[str, Path], tmp_path: Path, dense: str, first: str, then: str
) -> None:
    assert_goes_on(dense_ends[dense], tmp_path / "c", first, then)


def record_and_replay(checkpoint: Path, where: ParallelLayout) -> tuple[float, int, int]:
    """Take an R2 step: record, replay, return the norm and the shape of this rank's routes."""
    actor = start_policy(checkpoint, where)
    replica = Replica.find(tuple(actor.routers), place=actor.place)
    samples = replica_share(coded_samples((2, 3)), replica)
    batches = pack(samples, scorer=actor, count=4, routed=False)
    routes = actor.score(batches, temperature=1.0, routing=Routing.RECORD).routes
    recorded = [replace(batch, routes=routes[batch.key]) for batch in batches]
    norm = actor.update(recorded, mean_loss, temperature=1.0, routing=Routing.REPLAY).norm
    layers, rows, _ = routes[0].expert_ids.shape
    assert rows == len(batches[0].router_index.rows)
    return norm, layers, len(actor.routers)


@pytest.mark.parametrize("name", ["pp2", "pp2 ep2"])
def test_t5_a_stage_of_dense_layers_records_routes_of_no_layer(
    dense_ends: dict[str, Path], name: str
) -> None:
    ((expected, _, _),) = run_ranks(record_and_replay, 1, dense_ends["first"], layout())
    where, ranks = LAYOUTS[name]
    found = run_ranks(record_and_replay, ranks, dense_ends["first"], where)
    assert {layers for _, layers, _ in found} == {0, 2}
    for norm, layers, num_routers in found:
        assert layers == num_routers
        assert norm == pytest.approx(expected, rel=1e-5)
