"""Defects by which the routers of a Megatron model take the routes of other layers.

The routes spell their decoder layer, so the experts that ran tell whose routes a router took.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_replay.batch import Microbatch
from moe_replay.errors import ReplayScopeError
from moe_replay.megatron.actor import MegatronActor, build_policy
from moe_replay.megatron.chunks import moe_layers
from moe_replay.megatron.layout import ParallelLayout, initialize
from moe_replay.megatron.model import build_model, read_model_shape, transformer_config
from moe_replay.megatron.ranks.replica import Replica
from moe_replay.megatron.replay import ReplayScope
from moe_replay.routing import Origin, Routing, RoutingTrace
from moe_replay.testing.layouts import Plant, layout, planted
from moe_replay.testing.policies import SETTINGS, pack, start_policy, with_own_routes
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.samples import RoutedSample, make_samples, with_trace
from moe_replay.testing.tiny_models import write_tiny_checkpoint

pytestmark = pytest.mark.ranks
NUM_EXPERTS, TOPK = 16, 4
MOE_LAYERS = tuple(range(1, 8))
SEED = 61
Ran = dict[int, set[tuple[int, ...]]]
Layers = Callable[[tuple[int, ...]], tuple[int, ...]]
"""A rank's layers -> the layers whose routes it takes for its own."""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Qwen3-MoE checkpoint of eight layers, the first dense."""
    return write_tiny_checkpoint(
        tmp_path_factory.mktemp("eight"), num_hidden_layers=8, mlp_only_layers=[0]
    )


def spelled(layer: int) -> tuple[int, ...]:
    """Return the experts that spell a decoder layer."""
    return tuple(sorted((layer + step) % NUM_EXPERTS for step in (0, 1, 3, 7)))


def spelled_samples(layers: tuple[int, ...] = MOE_LAYERS, count: int = 4) -> list[RoutedSample]:
    """Return samples whose every row spells its layer, the last row without a route."""
    samples = []
    for sample in make_samples(count, seed=SEED):
        length = len(sample.token_ids)
        trace = RoutingTrace.record(
            np.tile([spelled(layer) for layer in layers], (length, 1, 1)),
            token_ids=sample.token_ids,
            valid=np.arange(length) < length - 1,
            layers=layers,
            num_experts=NUM_EXPERTS,
            origin=Origin.single(
                engine="spelled", engine_version="0", policy_version=0, num_rows=length
            ),
        )
        samples.append(with_trace(sample, trace))
    return samples


def ran_in(actor: MegatronActor, microbatches: list[Microbatch], routing: Routing) -> Ran:
    """Score, and return layer -> the expert sets that its router gave to rows with a route."""
    ran: Ran = {layer: set() for layer in actor.routers}
    hooks = []
    for layer, router in actor.routers.items():
        turns = iter(microbatches)

        def note(_: Any, __: Any, output: Any, layer: int = layer, turns: Any = turns) -> None:
            routes = next(turns).routes
            assert routes is not None
            chosen = output[1].numpy()[routes.valid]
            ran[layer] |= {tuple(np.flatnonzero(row).tolist()) for row in chosen}

        hooks.append(router.register_forward_hook(note))
    actor.score(microbatches, temperature=1.0, routing=routing)
    for hook in hooks:
        hook.remove()
    return ran


def _ran_on_this_rank(checkpoint: Path, where: ParallelLayout, choose: Layers) -> Ran:
    actor = start_policy(checkpoint, where)
    samples = spelled_samples()
    microbatches = pack(samples, scorer=actor, count=4, routed=False)
    replica = Replica.find(tuple(actor.routers), place=actor.place)
    plant = Plant(peer=lambda peer: replace(peer, layers=choose(peer.layers)))
    return ran_in(actor, planted(microbatches, samples, replica, plant), Routing.REPLAY)


def own_layers(layers: tuple[int, ...]) -> tuple[int, ...]:
    return layers


def ran_with(checkpoint: Path, where: ParallelLayout, choose: Layers = own_layers) -> list[Ran]:
    """Return what ran on each rank of two: routes are shared as in training, as ``choose`` says."""
    return run_ranks(_ran_on_this_rank, 2, checkpoint, where, choose)


def own_routes_only(ran: Ran) -> bool:
    """Tell whether every router ran what spells its own layer, and nothing else."""
    return all(experts == {spelled(layer)} for layer, experts in ran.items())


def first_of_the_model(layers: tuple[int, ...]) -> tuple[int, ...]:
    return MOE_LAYERS[: len(layers)]


def one_range(layers: tuple[int, ...]) -> tuple[int, ...]:
    """Return as many layers as the rank has, as if those of its chunks lay together."""
    return tuple(range(layers[0], layers[0] + len(layers)))


PP2 = layout(pp=2)
PP2_VPP2 = layout(pp=2, vpp=2)


def test_b4_each_chunk_of_an_interleaved_pipeline_takes_the_routes_of_its_own_layers(checkpoint):
    first, second = ran_with(checkpoint, PP2_VPP2)
    # Eight layers in four chunks of two; the first layer is dense.
    assert (tuple(first), tuple(second)) == ((1, 4, 5), (2, 3, 6, 7))
    assert own_routes_only(first)
    assert own_routes_only(second)


def test_b4_control_chunks_taken_as_one_range_run_the_routes_of_other_layers(checkpoint):
    first, second = ran_with(checkpoint, PP2_VPP2, one_range)
    assert first == {1: {spelled(1)}, 4: {spelled(2)}, 5: {spelled(3)}}
    assert not own_routes_only(second)


UNEVEN = {
    "six and two": (layout(pp=2, last=2), (1, 2, 3, 4, 5), (6, 7)),
    "custom": (layout(pp=2, stages="Ett|t*6L"), (1,), (2, 3, 4, 5, 6, 7)),
    "custom chunks": (layout(pp=2, vpp=2, stages="Et|t*3|t*2|t*2L"), (4, 5), (1, 2, 3, 6, 7)),
    "a stage of one dense layer": (layout(pp=2, stages="Et|t*7L"), (), MOE_LAYERS),
}


@pytest.mark.parametrize("name", UNEVEN)
def test_b5_uneven_stages_take_the_routes_of_their_own_layers(name, checkpoint):
    where, *expected = UNEVEN[name]
    ran = ran_with(checkpoint, where)
    assert [tuple(each) for each in ran] == expected
    assert all(own_routes_only(each) for each in ran)


def test_b5_control_stages_taken_as_equal_run_the_routes_of_other_layers(checkpoint):
    def of_an_even_split(layers: tuple[int, ...]) -> tuple[int, ...]:
        # By the formula of an even split the first of two stages ends before layer 4.
        return (1, 2, 3, 4, 5) if 1 in layers else (4, 5)

    where = UNEVEN["six and two"][0]
    first, second = ran_with(checkpoint, where, of_an_even_split)
    assert own_routes_only(first)
    assert second == {6: {spelled(4)}, 7: {spelled(5)}}


def test_b7_each_stage_replays_its_part_of_the_whole_models_routes(checkpoint):
    first, second = ran_with(checkpoint, PP2)
    assert (tuple(first), tuple(second)) == ((1, 2, 3), (4, 5, 6, 7))
    assert own_routes_only(first)
    assert own_routes_only(second)


def test_b7_control_layers_counted_from_the_first_on_every_stage_are_seen(checkpoint):
    first, second = ran_with(checkpoint, PP2, first_of_the_model)
    assert own_routes_only(first)
    assert second == {layer: {spelled(layer - 3)} for layer in (4, 5, 6, 7)}


def _recorded(checkpoint: Path, where: ParallelLayout) -> dict[int, RoutingTrace]:
    actor = start_policy(checkpoint, where)
    samples = with_own_routes(actor, make_samples(4, seed=SEED))
    return {sample.sample_id: sample.trace for sample in samples}


def test_b8_recorded_routes_are_gathered_in_the_order_of_the_decoder_layers(checkpoint):
    where = UNEVEN["custom chunks"][0]
    (alone,) = run_ranks(_recorded, 1, checkpoint, layout())
    for found in run_ranks(_recorded, 2, checkpoint, where):
        for sample_id, trace in alone.items():
            assert found[sample_id].layers == MOE_LAYERS
            ours, theirs = np.sort(found[sample_id].expert_ids), np.sort(trace.expert_ids)
            assert (ours == theirs).all()


def test_b8_control_the_order_of_the_ranks_would_swap_layers(checkpoint):
    (alone,) = run_ranks(_recorded, 1, checkpoint, layout())
    by_rank = [*UNEVEN["custom chunks"][1], *UNEVEN["custom chunks"][2]]
    ids = np.sort(alone[0].expert_ids)
    assert (ids[:, [MOE_LAYERS.index(layer) for layer in by_rank]] != ids).any()


def _second_model(checkpoint: Path) -> tuple[Ran, bool, bool]:
    initialize(layout())
    orphan = build_policy(
        checkpoint, layout(), dtype=torch.float32, settings=SETTINGS, num_updates=10
    )
    actor = build_policy(
        checkpoint, layout(), dtype=torch.float32, settings=SETTINGS, num_updates=10
    )
    microbatches = pack(spelled_samples(), scorer=actor)
    live = orphan.score(microbatches, temperature=1.0, routing=Routing.LIVE).samples
    seats: list[Any] = []
    actor.routers[1].register_forward_hook(
        lambda *_: seats.append([router.router_replay for router in orphan.routers.values()])
    )
    ran = ran_in(actor, microbatches, Routing.REPLAY)
    after = orphan.score(microbatches, temperature=1.0, routing=Routing.LIVE).samples
    same = all(np.array_equal(live[i].token_logprobs, after[i].token_logprobs) for i in live)
    return ran, all(seat is None for each in seats for seat in each), same


def test_b6_a_model_built_before_the_policy_takes_none_of_its_routes(checkpoint):
    ((ran, orphan_unseated, orphan_unchanged),) = run_ranks(_second_model, 1, checkpoint)
    assert own_routes_only(ran)
    assert orphan_unseated
    assert orphan_unchanged


def _stock_list(checkpoint: Path) -> tuple[int, bool, list[bool]]:
    from megatron.core.transformer.moe.router_replay import RouterReplay

    initialize(layout())
    shape = read_model_shape(checkpoint)
    config = transformer_config(shape, layout())
    config.moe_enable_routing_replay = True
    orphan, policy = build_model(shape, config)[0], build_model(shape, config)[0]
    routes = [torch.tensor([spelled(layer)]) for layer in MOE_LAYERS]
    everything: Any = RouterReplay
    refused = False
    try:
        everything.set_replay_data(routes)
    except ValueError:
        refused = True
    # What remains is to fill the list from its start.
    for replay, target in zip(everything.global_router_replay_instances, routes, strict=False):
        replay.set_target_indices(target)
    took = [
        all(r.router_replay.target_topk_idx is not None for r in moe_layers([model]).values())
        for model in (orphan, policy)
    ]
    return len(everything.global_router_replay_instances), refused, took


def test_b6_control_megatrons_own_list_gives_the_routes_to_the_model_built_first(checkpoint):
    ((num_seats, refused, took),) = run_ranks(_stock_list, 1, checkpoint)
    assert num_seats == 2 * len(MOE_LAYERS)
    assert refused
    assert took == [True, False]


def _routers_of_no_scope(checkpoint: Path) -> str:
    actor = start_policy(checkpoint)
    microbatches = pack(spelled_samples(), scorer=actor)
    scope = ReplayScope(actor.routers, {m.key: m.routes for m in microbatches if m.routes})
    with pytest.raises(ReplayScopeError) as caught, scope.open():
        pass
    return str(caught.value)


def test_b6_a_scope_whose_policy_never_ran_says_so(checkpoint):
    """Replay of an orphan would otherwise look like replay of the policy."""
    (said,) = run_ranks(_routers_of_no_scope, 1, checkpoint)
    assert "which ran 0 times" in said
