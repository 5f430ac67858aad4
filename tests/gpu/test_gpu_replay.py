"""Replay on a GPU: nccl, bfloat16 with float32 main weights, Transformer Engine where installed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import pytest
import torch

from moe_replay.batch import Microbatch, Sample
from moe_replay.megatron.actor import MegatronActor
from moe_replay.megatron.replay.overlap import WatchedRoutes
from moe_replay.megatron.replay.upload import upload
from moe_replay.megatron.scorer import RouteWatch
from moe_replay.megatron.upstream.compat import transformer_engine_usable
from moe_replay.routing import Routing
from moe_replay.routing.guard import OverlapCounts, count_overlaps
from moe_replay.testing.policies import mean_loss, pack, with_own_routes
from moe_replay.testing.samples import make_samples, randomise_routes, shift_tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SEED = 17


def logprobs(actor: MegatronActor, samples: Sequence[Sample], routing: Routing) -> np.ndarray:
    scores = actor.score(pack(samples, scorer=actor), temperature=1.0, routing=routing).samples
    return np.concatenate([scores[sample.sample_id].token_logprobs for sample in samples])


def own(actor: MegatronActor) -> list[Sample]:
    print("seed", SEED)
    return with_own_routes(actor, make_samples(8, seed=SEED))


def test_the_policy_lives_on_the_gpu(actor: MegatronActor) -> None:
    kinds = {type(module).__module__.split(".")[0] for module in actor.modules[0].modules()}
    assert actor.device.type == "cuda"
    assert ("transformer_engine" in kinds) == transformer_engine_usable()


def test_own_routes_change_nothing_and_others_do(actor: MegatronActor) -> None:
    samples = own(actor)
    live = logprobs(actor, samples, Routing.LIVE)
    replayed = logprobs(actor, samples, Routing.REPLAY)
    shifted = logprobs(actor, shift_tokens(samples, 1), Routing.REPLAY)
    # Kernels may add up in another order from call to call, in bfloat16.
    assert np.abs(replayed - live).mean() < 5e-3
    assert np.abs(shifted - live).mean() > 10 * np.abs(replayed - live).mean() + 1e-2


def test_the_router_learns_from_replayed_experts_outside_its_top_k(actor: MegatronActor) -> None:
    samples = randomise_routes(own(actor), seed=SEED)
    before = [router.weight.detach().clone() for router in actor.routers.values()]
    actor.update(pack(samples, scorer=actor), mean_loss, temperature=1.0, routing=Routing.REPLAY)
    after = [router.weight.detach() for router in actor.routers.values()]
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_routes_are_uploaded_in_their_own_dtype_without_waiting(actor: MegatronActor) -> None:
    routes = np.arange(256, dtype=np.uint8).reshape(2, 32, 4)
    there = upload(routes, actor.device)
    assert there.dtype == torch.uint8
    torch.cuda.synchronize()
    assert np.array_equal(there.cpu().numpy(), routes)


def test_overlaps_counted_on_the_gpu_are_those_of_the_reference(actor: MegatronActor) -> None:
    seen: list[tuple[Microbatch, WatchedRoutes]] = []
    watch = RouteWatch(observe=lambda *given: seen.append(given), keeps_live=True)
    for samples in (own(actor), shift_tokens(own(actor), 1)):
        actor.score(
            pack(samples, scorer=actor), temperature=1.0, routing=Routing.REPLAY, watch=watch
        )
    for microbatch, watched in seen:
        routes = microbatch.routes
        assert routes is not None and watched.live_ids is not None
        expected = count_overlaps(
            routes.expert_ids.transpose(1, 0, 2),
            watched.live_ids,
            valid=routes.valid,
            sample=microbatch.sample_ids,
            position=microbatch.positions,
            layers=routes.layers,
            num_experts=routes.num_experts,
        )
        for field in fields(OverlapCounts):
            got, wanted = getattr(watched.counts, field.name), getattr(expected, field.name)
            assert np.array_equal(got, wanted), field.name
