"""Defects of recomputation and schedules: routes of another microbatch."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_replay.batch import Microbatch
from moe_replay.errors import ReplayScopeError
from moe_replay.megatron.actor import MegatronActor
from moe_replay.megatron.chunks import unwrap
from moe_replay.megatron.replay import RecordScope, ReplayScope
from moe_replay.routing import Routing
from moe_replay.testing.layouts import FULL, MOE, Case, coded_samples, layout, replayed_step
from moe_replay.testing.policies import gradients, pack, start_policy
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.tiny_models import write_tiny_checkpoint

pytestmark = pytest.mark.ranks
LAYERS = (0, 1, 2, 3)
TOPK = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random Qwen3-MoE checkpoint of 4 layers."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def batches(actor: MegatronActor, count: int = 4) -> list[Microbatch]:
    """Return microbatches whose routes spell sample, position and layer, every row with one."""
    return [
        replace(m, routes=replace(m.routes, valid=m.index.is_token[m.router_rows]))
        for m in pack(coded_samples(LAYERS), scorer=actor, count=count)
        if m.routes is not None
    ]


def ready(actor: MegatronActor) -> None:
    for chunk in actor.chunks:
        chunk.train()
        chunk.zero_grad_buffer()


def forward(actor: MegatronActor, microbatch: Microbatch, scope: Any = None) -> torch.Tensor:
    return actor._forward(actor.chunks[0], microbatch, scope)


def scope_of(actor: MegatronActor, microbatches: list[Microbatch]) -> ReplayScope:
    return ReplayScope(actor.routers, {m.key: m.routes for m in microbatches if m.routes})


def error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest relative error of a parameter's gradient."""
    return max(
        float((found[name] - gradient).norm() / (gradient.norm() + 1e-12))
        for name, gradient in expected.items()
    )


def _trained(checkpoint: Path, recompute: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Score some microbatches, then train on others."""
    actor = start_policy(checkpoint, **recompute)
    scored, trained = batches(actor)[:2], batches(actor)[2:]
    scope = scope_of(actor, scored)
    with torch.no_grad(), scope.open():
        for microbatch in scored:
            forward(actor, microbatch, scope)
    ready(actor)
    scope = scope_of(actor, trained)
    with scope.open():
        for microbatch in trained:
            forward(actor, microbatch, scope).square().mean().backward()
    return gradients(actor)


def _stock_pass(actor: MegatronActor, microbatches: list[Microbatch], *, backward: bool) -> None:
    """Replay through Megatron's own RouterReplay, its action flipped as its documentation says."""
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    seats: dict[int, Any] = {}
    for layer, router in actor.routers.items():
        router.router_replay = router.router_replay or RouterReplay()
        seats[layer] = router.router_replay
    for microbatch in microbatches:
        assert microbatch.routes is not None
        for layer, seat in seats.items():
            ids = microbatch.routes.expert_ids[microbatch.routes.layers.index(layer)]
            seat.set_target_indices(torch.from_numpy(ids.astype(np.int64)))
            seat.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        output = forward(actor, microbatch)
        for seat in seats.values():
            seat.set_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)
        if backward:
            output.square().mean().backward()


def test_e1_a_scoring_pass_leaves_nothing_that_recomputation_could_pick_up(checkpoint):
    (plain,) = run_ranks(_trained, 1, checkpoint, {})
    for recompute in (FULL, MOE):
        (found,) = run_ranks(_trained, 1, checkpoint, recompute)
        assert error(found, plain) < 1e-5


def _stock_trained(checkpoint: Path, recompute: dict[str, Any], scores: bool) -> Any:
    """Train on one microbatch with Megatron's own replay, perhaps after scoring another."""
    actor = start_policy(checkpoint, **recompute)
    (microbatch, *_) = batches(actor)
    assert microbatch.routes is not None
    mirrored = replace(microbatch.routes, expert_ids=15 - microbatch.routes.expert_ids)
    if scores:
        with torch.no_grad():
            _stock_pass(actor, [replace(microbatch, routes=mirrored)], backward=False)
    ready(actor)
    _stock_pass(actor, [microbatch], backward=True)
    return gradients(actor)


def test_e1_control_megatrons_own_queue_hands_the_scored_routes_to_recomputation(checkpoint):
    (plain,) = run_ranks(_stock_trained, 1, checkpoint, {}, False)
    (clean,) = run_ranks(_stock_trained, 1, checkpoint, MOE, False)
    (poisoned,) = run_ranks(_stock_trained, 1, checkpoint, MOE, True)
    assert error(clean, plain) < 1e-5
    assert error(poisoned, plain) > 0.5


@cache
def alone(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the gradient of a step of a single process."""
    case = Case(layout=layout(), ranks=1)
    return run_ranks(replayed_step, 1, checkpoint, case, LAYERS)[0].gradients


INTERLEAVED = {"full": FULL, "selective": MOE}


@pytest.mark.parametrize("kind", INTERLEAVED)
def test_e3_recomputation_under_an_interleaved_schedule_takes_its_own_microbatch(kind, checkpoint):
    """Four microbatches over two stages of two chunks, against a step of one process."""
    expected = alone(checkpoint)
    case = Case(layout=layout(pp=2, vpp=2), ranks=2, overrides=INTERLEAVED[kind])
    for step in run_ranks(replayed_step, 2, checkpoint, case, LAYERS):
        assert error(step.gradients, expected) < 1e-5


class _LatestMicrobatch(ReplayScope):
    """The planted defect: recomputation takes the routes of the last forward pass."""

    latest = 0

    def _checkpoint_with_key(self, plain: Any) -> Any:
        return plain

    def choose(self, *call: Any) -> Any:
        self.latest = self.latest if self._key is None else self._key
        with self.microbatch(self.latest):
            return super().choose(*call)

    def _check_complete(self) -> None:
        """Say nothing, as a global action would."""


def _two_in_flight(checkpoint: Path, kind: type[ReplayScope]) -> dict[str, torch.Tensor]:
    """Run two microbatches forward before the first goes backward, as every pipeline does."""
    actor = start_policy(checkpoint, **MOE)
    first, second = batches(actor)[:2]
    assert first.routes is not None
    # Of equal length, so that wrong routes fit.
    second = replace(
        first, key=1, routes=replace(first.routes, expert_ids=15 - first.routes.expert_ids)
    )
    ready(actor)
    scope = kind(actor.routers, {m.key: m.routes for m in (first, second) if m.routes})
    with scope.open():
        outputs = [forward(actor, microbatch, scope) for microbatch in (first, second)]
        for output in outputs:
            output.square().mean().backward()
    return gradients(actor)


def test_e3_control_a_scope_that_knew_only_the_latest_microbatch_is_seen(checkpoint):
    (keyed,) = run_ranks(_two_in_flight, 1, checkpoint, ReplayScope)
    (latest,) = run_ranks(_two_in_flight, 1, checkpoint, _LatestMicrobatch)
    assert error(latest, keyed) > 0.1


def _recorded(checkpoint: Path, stock: bool) -> list[bool]:
    """Record two microbatches under full recomputation; return whether each kept its routes."""
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    actor = start_policy(checkpoint, **FULL)
    microbatches = [replace(m, routes=None) for m in batches(actor)[:2]]
    expected = actor.score(microbatches, temperature=1.0, routing=Routing.RECORD).routes
    ready(actor)
    if not stock:
        scope = RecordScope(actor.routers, [0, 1])
        with scope.open():
            outputs = [forward(actor, microbatch, scope) for microbatch in microbatches]
            for output in reversed(outputs):
                output.sum().backward()
        return [
            np.array_equal(scope.expert_ids(key), expected[key].expert_ids)
            for key in (0, 1)  # taken once each
        ]
    seat: Any = RouterReplay()
    actor.routers[0].router_replay = seat
    seat.set_router_replay_action(RouterReplayAction.RECORD)
    outputs = [forward(actor, microbatch) for microbatch in microbatches]
    kept = []
    for key, output in ((1, outputs[1]), (0, outputs[0])):
        output.sum().backward()
        held = seat.get_recorded_indices().numpy()
        # After all forward passes the slot should hold the last microbatch.
        kept.append(key == 1 or np.array_equal(held, expected[1].expert_ids[0]))
    return kept


def test_e4_recomputation_records_nothing_again(checkpoint):
    assert run_ranks(_recorded, 1, checkpoint, False) == [[True, True]]


def test_e4_control_megatrons_own_slot_is_overwritten_by_an_older_microbatch(checkpoint):
    assert run_ranks(_recorded, 1, checkpoint, True) == [[True, False]]


def _repeated_layer(checkpoint: Path, repeated: bool) -> str:
    actor = start_policy(checkpoint)
    layers: Any = unwrap(actor.chunks[0]).decoder.layers
    (microbatch, *_) = batches(actor)
    if repeated:
        layers[2].mlp = layers[1].mlp
    scope = scope_of(actor, [microbatch])
    try:
        with torch.no_grad(), scope.open():
            forward(actor, microbatch, scope)
    except ReplayScopeError as said:
        return str(said)
    return "complete"


def test_e5_a_router_that_runs_twice_in_a_microbatch_is_counted_and_refused(checkpoint):
    (said,) = run_ranks(_repeated_layer, 1, checkpoint, True)
    assert "layer 1, microbatch 0, which ran 2 times" in said
    assert "a repeated layer shares one router" in said


def test_e5_control_routers_of_their_own_are_complete(checkpoint):
    assert run_ranks(_repeated_layer, 1, checkpoint, False) == ["complete"]


def _gate(checkpoint: Path, forget_the_name: bool) -> str:
    from megatron.core.transformer.moe import moe_utils

    actor = start_policy(checkpoint)
    if forget_the_name:
        delattr(moe_utils, "te_general_gemm")
    try:
        actor.score(batches(actor)[:1], temperature=1.0, routing=Routing.LIVE)
    except NameError as said:
        return str(said)
    return "ran"


def test_e9_a_router_runs_without_transformer_engine(checkpoint):
    assert run_ranks(_gate, 1, checkpoint, False) == ["ran"]


def test_e9_control_megatrons_gate_reads_a_name_that_is_not_there(checkpoint):
    from moe_replay.megatron.upstream import compat

    if compat.VERSION >= (0, 17):
        pytest.skip("this Megatron-Core defines te_general_gemm everywhere")
    (said,) = run_ranks(_gate, 1, checkpoint, True)
    assert "te_general_gemm" in said
