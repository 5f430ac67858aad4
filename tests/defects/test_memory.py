"""Defects by which routes take or keep more memory than their own bytes."""

from __future__ import annotations

import gc
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_replay.batch import Microbatch
from moe_replay.megatron.actor import MegatronActor
from moe_replay.megatron.ranks.replica import Replica
from moe_replay.megatron.ranks.sharing import share_routes
from moe_replay.megatron.replay import ReplayScope
from moe_replay.routing import RouteSlice, Routing, RoutingTrace
from moe_replay.testing.layouts import coded_samples, layout
from moe_replay.testing.policies import mean_loss, pack, start_policy
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.tiny_models import write_tiny_checkpoint

pytestmark = pytest.mark.ranks
LAYERS = (0, 1, 2, 3)
TOPK = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random Qwen3-MoE checkpoint of 4 layers."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def bytes_held(root: Any) -> int:
    """Return the bytes of each distinct array and tensor that ``root`` leads to, without models."""
    seen: set[int] = set()
    storages: dict[int, int] = {}
    pending = [root]
    while pending:
        thing = pending.pop()
        if id(thing) in seen or isinstance(
            thing, torch.nn.Module | type | types.ModuleType | types.FunctionType
        ):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, np.ndarray):
            while isinstance(thing.base, np.ndarray):
                thing = thing.base
            storages[thing.ctypes.data] = thing.nbytes
        else:
            pending.extend(gc.get_referents(thing))
    return sum(storages.values())


def repeated(actor: MegatronActor, count: int) -> list[Microbatch]:
    """Return the same microbatch ``count`` times, with arrays of their own."""
    (microbatch, *_) = pack(coded_samples(LAYERS), scorer=actor)
    assert microbatch.routes is not None
    routes = microbatch.routes
    return [
        replace(
            microbatch,
            key=key,
            routes=replace(routes, expert_ids=routes.expert_ids.copy(), valid=routes.valid.copy()),
        )
        for key in range(count)
    ]


def _scope_bytes(checkpoint: Path, count: int) -> int:
    """Return what a scope holds beside the routes after so many microbatches, both passes."""
    actor = start_policy(checkpoint)
    microbatches = repeated(actor, count)
    for chunk in actor.chunks:
        chunk.train()
    scope = ReplayScope(actor.routers, {m.key: m.routes for m in microbatches if m.routes})
    with scope.open():
        for microbatch in microbatches:
            actor._forward(actor.chunks[0], microbatch, scope).sum().backward()
        return bytes_held(scope) - sum(m.routes.nbytes for m in microbatches if m.routes)


def test_e2_what_a_scope_holds_does_not_grow_with_its_microbatches(checkpoint):
    (few,), (many,) = (run_ranks(_scope_bytes, 1, checkpoint, count) for count in (2, 12))
    assert many <= few


def _queue_bytes(checkpoint: Path, count: int) -> int:
    from megatron.core.transformer.moe.router_replay import RouterReplay

    actor = start_policy(checkpoint)
    seat: Any = RouterReplay()
    for microbatch in repeated(actor, count):
        assert microbatch.routes is not None
        ids = microbatch.routes.expert_ids[0].astype(np.int64)
        seat.set_target_indices(torch.from_numpy(ids))
    return bytes_held(seat)


def test_e2_control_megatrons_own_queue_grows_with_every_microbatch(checkpoint):
    (few,), (many,) = (run_ranks(_queue_bytes, 1, checkpoint, count) for count in (2, 12))
    assert many == 6 * few


WHERE = {
    "tp2": (layout(tp=2), 4),
    "cp2": (layout(cp=2), 4),
    "pp2": (layout(pp=2), 2),
}


def _resident(checkpoint: Path, name: str) -> tuple[int, int, int, int]:
    """Return the bytes of this rank's routes on host and device, its rows, and those of all."""
    where, _ = WHERE[name]
    actor = start_policy(checkpoint, where)
    samples = coded_samples(LAYERS)
    replica = Replica.find(tuple(actor.routers), place=actor.place)
    traces = {s.sample_id: s.trace for s in samples[replica.own :: replica.size]}
    microbatches = pack(samples, scorer=actor, count=2, routed=False)
    routes = share_routes(replica, microbatches, traces)
    scope = ReplayScope(actor.routers, routes)
    uploaded = sum(
        scope._upload_once(key, held, actor.device).expert_ids.nbytes
        for key, held in routes.items()
    )
    return (
        bytes_held(routes),
        uploaded,
        sum(len(m.router_index.rows) for m in microbatches),
        sum(m.index.num_rows for m in microbatches),
    )


@pytest.mark.parametrize("name", WHERE)
def test_e7_a_rank_holds_the_bytes_of_its_rows_and_layers_alone(name, checkpoint):
    num_layers = WHERE[name][1]
    for held, uploaded, rows, whole in run_ranks(_resident, 2, checkpoint, name):
        # One byte an expert, one byte a row that says whether it has a route.
        assert held == rows * (num_layers * TOPK + 1)
        assert uploaded == rows * num_layers * TOPK
        # Control: everything to everybody, widened before it is cut.
        assert whole * len(LAYERS) * TOPK * 8 > 14 * held


def _alive() -> int:
    """Return the bytes of all routes and traces in this process."""
    gc.collect()
    return sum(
        thing.expert_ids.nbytes
        for thing in gc.get_objects()
        # Not isinstance: it asks proxies for their class, and some warn.
        if type(thing) in (RouteSlice, RoutingTrace)
    )


def _over_steps(checkpoint: Path, steps: int, keeps: bool) -> list[int]:
    actor = start_policy(checkpoint)
    # What exists by now is not looked through again: collecting after each step stays quick.
    gc.freeze()
    kept: list[Any] = []
    alive = []
    for _ in range(steps):
        microbatches = pack(coded_samples(LAYERS)[:2], scorer=actor)
        actor.update(microbatches, mean_loss, temperature=1.0, routing=Routing.REPLAY)
        if keeps:
            kept.append(microbatches)
        alive.append(_alive())
    return alive


def test_e8_routes_of_fifty_steps_do_not_add_up(checkpoint):
    (alive,) = run_ranks(_over_steps, 1, checkpoint, 50, False)
    assert alive[0] > 0
    assert set(alive) == {alive[0]}


def test_e8_control_a_step_that_is_kept_is_seen(checkpoint):
    (alive,) = run_ranks(_over_steps, 1, checkpoint, 4, True)
    assert np.diff(alive).min() > 0
