"""Overlaps counted on the device are those of the reference, whatever the shapes and shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_replay.batch import Microbatch, RankPlace, build_microbatch
from moe_replay.errors import ReplayScopeError
from moe_replay.megatron.layout import ParallelLayout
from moe_replay.megatron.replay import ReplayScope, overlap
from moe_replay.megatron.replay.overlap import OverlapCounter, RowOwners, WatchedRoutes
from moe_replay.megatron.scorer import RouteWatch
from moe_replay.routing import Origin, RouteSlice, Routing, RoutingTrace
from moe_replay.routing.guard import OverlapCounts, count_overlaps
from moe_replay.testing.layouts import layout
from moe_replay.testing.policies import (
    lone_replica,
    mean_loss,
    pack,
    shared,
    start_policy,
    with_own_routes,
)
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.samples import RoutedSample, make_samples, shift_tokens, with_trace
from moe_replay.testing.tiny_models import write_tiny_checkpoint

SHAPES = {
    "8/2 x 3": (8, 2, 3),
    "16/4 x 1": (16, 4, 1),
    "256/3 x 2": (256, 3, 2),
    "300/6 x 4": (300, 6, 4),
}
PLACES = {
    "one rank": RankPlace(),
    "the second of two context-parallel ranks": RankPlace(cp_size=2, cp_rank=1),
    "the first of two context-parallel ranks": RankPlace(cp_size=2, cp_rank=0),
    "the second of four sequence shards": RankPlace(tp_size=4, tp_rank=1),
    "both": RankPlace(tp_size=2, tp_rank=1, cp_size=2, cp_rank=1),
}


def routed(rng: np.random.Generator, shape: tuple[int, int, int]) -> list[RoutedSample]:
    """Return samples of few different routes, so that rows repeat, share slots and have holes."""
    experts, topk, layers = shape
    samples = []
    for sample in make_samples(5, seed=int(rng.integers(1 << 30)), min_length=6, max_length=40):
        length = len(sample.token_ids)
        popular = rng.random((3, layers, experts)).argsort(axis=2)[..., :topk]
        ids = popular[rng.integers(0, 3, length)]
        trace = RoutingTrace.record(
            ids,
            token_ids=sample.token_ids,
            valid=rng.random(length) < 0.9,
            layers=tuple(2 * layer + 1 for layer in range(layers)),
            num_experts=experts,
            origin=Origin.single(
                engine="drawn", engine_version="0", policy_version=0, num_rows=length
            ),
        )
        samples.append(with_trace(sample, trace))
    return samples


def near(rng: np.random.Generator, routes: RouteSlice) -> np.ndarray:
    """Return live routes of all rows: many are the replayed ones, some of any other row."""
    layers, rows, topk = routes.expert_ids.shape
    live = routes.expert_ids[:, rng.integers(0, rows, rows)].astype(np.int64)
    kept = rng.random((layers, rows)) < 0.6
    live[kept] = routes.expert_ids[kept]
    order = rng.random(live.shape).argsort(axis=2)
    live = np.take_along_axis(live, order, axis=2)
    # Rows without a route hold anything: their live routes come from the router.
    live[:, ~routes.valid] = np.arange(topk)
    return live


def counted(
    routes: RouteSlice, owners: RowOwners, live: np.ndarray, order: Sequence[int]
) -> OverlapCounts:
    counter = OverlapCounter(
        routes, torch.from_numpy(routes.expert_ids), owners, layers=routes.layers
    )
    for number in order:
        counter.add(routes.layers[number], torch.from_numpy(live[number]))
    return counter.finish()[0]


def assert_equal(got: OverlapCounts, expected: OverlapCounts) -> None:
    for field in fields(OverlapCounts):
        a, b = getattr(got, field.name), getattr(expected, field.name)
        assert np.array_equal(a, b), field.name
        if isinstance(b, np.ndarray):
            assert a.dtype == b.dtype, field.name


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("max_bytes", [overlap._MAX_BYTES, 3000])
def test_device_counts_are_those_of_the_reference(
    shape: str, place: str, max_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlap, "_MAX_BYTES", max_bytes)
    print("seed", seed := 11)
    rng = np.random.default_rng(seed)
    samples = routed(rng, SHAPES[shape])
    packed = build_microbatch(0, samples, place=PLACES[place])
    replica = lone_replica(samples[0].trace.layers, PLACES[place])
    (microbatch,) = shared([packed], samples, replica)
    routes = microbatch.routes
    assert routes is not None and not routes.valid.all()
    rows = microbatch.router_rows
    owners = RowOwners(sample=microbatch.sample_ids[rows], position=microbatch.positions[rows])
    live = near(rng, routes)
    expected = count_overlaps(
        routes.expert_ids.transpose(1, 0, 2),
        live.transpose(1, 0, 2),
        valid=routes.valid,
        sample=owners.sample,
        position=owners.position,
        layers=routes.layers,
        num_experts=routes.num_experts,
    )
    assert expected.nearer.any() and expected.farther.any() and expected.flips.any()
    order = rng.permutation(len(routes.layers)).tolist()
    got = counted(routes, owners, live, order)
    assert_equal(got, expected)
    # The control: one slot of one row and layer that differs shows.
    in_both = (live[-1, :, 0, None] == routes.expert_ids[-1]).any(axis=1)
    row = int(np.flatnonzero(routes.valid & in_both)[0])
    live[-1, row, 0] = next(
        e
        for e in range(routes.num_experts)
        if e not in live[-1, row] and e not in routes.expert_ids[-1, row]
    )
    assert counted(routes, owners, live, order).own.sum() == got.own.sum() - 1


def test_rows_that_repeat_the_row_before_are_seen_through_any_order_of_ids() -> None:
    ids = np.array(
        [[[1, 2], [2, 1], [3, 4], [4, 3]], [[5, 6], [6, 5], [0, 1], [1, 0]]], dtype=np.uint8
    )
    routes = RouteSlice(expert_ids=ids, valid=np.ones(4, dtype=bool), layers=(0, 3), num_experts=8)
    owners = RowOwners(sample=np.zeros(4, dtype=np.int64), position=np.arange(4))
    live = ids.astype(np.int64).copy()
    live[1, 1] = [0, 7]
    # Row 1 repeats row 0 while its live route does not; row 3 repeats row 2 and so does its live
    # route.
    assert counted(routes, owners, live, (0, 1)).repeats.tolist() == [False, True, False, False]


def test_the_most_chosen_set_and_its_share_are_found() -> None:
    ids = np.tile(np.array([6, 1], dtype=np.uint8), (1, 10, 1))
    routes = RouteSlice(expert_ids=ids, valid=np.arange(10) != 4, layers=(2,), num_experts=8)
    owners = RowOwners(sample=np.zeros(10, dtype=np.int64), position=np.arange(10))
    live = np.tile(np.array([3, 0]), (1, 10, 1))
    live[0, 7] = [0, 5]
    counter = OverlapCounter(routes, torch.from_numpy(ids), owners, layers=(2,))
    counter.add(2, torch.from_numpy(live[0]))
    use = counter.finish()[1]
    assert (use.layers, use.num_rows) == ((2,), 9)
    assert (use.favourite.tolist(), use.favourite_times.tolist()) == ([[0, 3]], [8])


def test_a_layer_that_did_not_run_is_not_taken_for_counted() -> None:
    ids = np.zeros((2, 3, 1), dtype=np.uint8)
    routes = RouteSlice(expert_ids=ids, valid=np.ones(3, bool), layers=(0, 1), num_experts=4)
    owners = RowOwners(sample=np.zeros(3, dtype=np.int64), position=np.arange(3))
    counter = OverlapCounter(routes, torch.from_numpy(ids), owners, layers=(0, 1))
    counter.add(1, torch.zeros((3, 1), dtype=torch.int64))
    with pytest.raises(AssertionError, match=r"layers \[0\] have not run"):
        counter.finish()


def expected_of(
    microbatch: Microbatch, live_ids: np.ndarray, layers: Sequence[int]
) -> OverlapCounts:
    routes, rows = microbatch.routes, microbatch.router_rows
    assert routes is not None
    held = [routes.layers.index(layer) for layer in layers]
    return count_overlaps(
        routes.expert_ids[held].transpose(1, 0, 2),
        live_ids,
        valid=routes.valid,
        sample=microbatch.sample_ids[rows],
        position=microbatch.positions[rows],
        layers=tuple(layers),
        num_experts=routes.num_experts,
    )


def _passes(checkpoint: Path, where: ParallelLayout, overrides: dict[str, Any]) -> list[float]:
    """Compare the counts of both kinds of pass with the reference; return both agreements."""
    actor = start_policy(checkpoint, where, **overrides)
    print("seed", seed := 23)
    # Two samples of 20 tokens a microbatch: four of them, as the interleaved schedule wants an even
    # number.
    own = with_own_routes(actor, make_samples(8, seed=seed, min_length=20, max_length=20))
    agreement = []
    seen: list[tuple[Microbatch, WatchedRoutes]] = []
    watch = RouteWatch(observe=lambda *given: seen.append(given), keeps_live=True)
    for samples in (own, shift_tokens(own, 1)):
        seen.clear()
        microbatches = pack(samples, scorer=actor)
        options: dict[str, Any] = {"temperature": 1.0, "routing": Routing.REPLAY, "watch": watch}
        actor.score(microbatches, **options)
        actor.backward(microbatches, mean_loss, **options)
        assert len(seen) == 2 * len(microbatches)
        for microbatch, watched in seen:
            assert watched.live_ids is not None
            expected = expected_of(microbatch, watched.live_ids, sorted(actor.routers))
            assert_equal(watched.counts, expected)
        counts = [watched.counts for _, watched in seen]
        slots = sum(part.num_rows.sum() * part.topk * len(part.layers) for part in counts)
        agreement.append(sum(int(part.own.sum()) for part in counts) / slots)
    return agreement


LAYOUTS: dict[str, tuple[int, ParallelLayout, dict[str, Any]]] = {
    "one rank": (1, layout(), {}),
    "recomputed": (
        1,
        layout(),
        {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    ),
    "context": (2, layout(cp=2), {}),
    "sequence": (2, layout(tp=2), {"sequence_parallel": True}),
    "interleaved stages": (2, layout(pp=2, vpp=2), {}),
}


@pytest.mark.ranks
@pytest.mark.parametrize("name", LAYOUTS)
def test_passes_of_the_model_count_as_the_reference_in_every_layout(
    name: str, checkpoint: Path
) -> None:
    ranks, where, overrides = LAYOUTS[name]
    for own, shifted in run_ranks(_passes, ranks, checkpoint, where, overrides):
        # Rounding differs between the passes that record and replay, and may flip a row that is
        # nearly tied.
        assert own > 0.99
        assert shifted < 0.9


@pytest.mark.ranks
def test_group_limited_routers_are_counted_too(tmp_path: Path) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path, "deepseek_v3", num_hidden_layers=3)
    ((own, shifted),) = run_ranks(_passes, 1, checkpoint, layout(), {})
    assert own > 0.99
    assert shifted < 0.95


def _uncounted(checkpoint: Path) -> list[str]:
    actor = start_policy(checkpoint)
    microbatch = pack(with_own_routes(actor, make_samples(2, seed=1)), max_tokens=1000)[0]
    assert microbatch.routes is not None
    bare = ReplayScope(actor.routers, {0: microbatch.routes})
    rows = microbatch.router_rows
    owners = RowOwners(sample=microbatch.sample_ids[rows], position=microbatch.positions[rows])
    counting = ReplayScope(actor.routers, {0: microbatch.routes}, owners={0: owners})
    with torch.no_grad():
        for scope in (bare, counting):
            with scope.open():
                actor._forward(actor.chunks[0], microbatch, scope)
    counting.watched(0)
    said = []
    for scope in (bare, counting):
        with pytest.raises(ReplayScopeError) as caught:
            scope.watched(0)
        said.append(str(caught.value))
    return said


@pytest.mark.ranks
def test_counts_are_there_once_and_only_where_they_were_asked_for(checkpoint: Path) -> None:
    for said in run_ranks(_uncounted, 1, checkpoint)[0]:
        assert "nothing was counted of microbatch 0" in said
