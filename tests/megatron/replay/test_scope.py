"""The replay scope on the real Megatron-Core: what it forces, leaves live and refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_replay.batch import Microbatch, Sample
from moe_replay.errors import ReplayScopeError, TraceError, UnsupportedError
from moe_replay.megatron.actor import MegatronActor
from moe_replay.megatron.replay import RecordScope, ReplayScope
from moe_replay.routing import RouteSlice, Routing
from moe_replay.testing.policies import gradients, mean_loss, pack, start_policy, with_own_routes
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.samples import RoutedSample, make_samples, random_routes, with_routes

SEED = 20


def in_one_rank(test: Callable[..., Any], *args: Any) -> Any:
    """Run ``test`` in a process of its own, so that Megatron's global state ends with it."""
    return run_ranks(test, 1, *args)[0]


def logprobs(actor: MegatronActor, samples: list[Sample], routing: Routing) -> np.ndarray:
    """Return the log-probabilities of all samples, one after the other."""
    scored = actor.score(pack(samples), temperature=1.0, routing=routing).samples
    return np.concatenate([scored[sample.sample_id].token_logprobs for sample in samples])


def randomly_routed(actor: MegatronActor, count: int = 6) -> list[RoutedSample]:
    """Return samples whose every row holds random experts."""
    print("seed", SEED)
    rng = np.random.default_rng(SEED)
    samples = with_own_routes(actor, make_samples(count, seed=SEED))
    return [with_routes(s, random_routes(rng, s.trace.expert_ids, 16)) for s in samples]


def _own_routes(checkpoint: Path) -> tuple[bool, bool]:
    actor = start_policy(checkpoint)
    samples = with_own_routes(actor, make_samples(6, seed=SEED))
    live = logprobs(actor, samples, Routing.LIVE)
    own = logprobs(actor, samples, Routing.REPLAY)
    other = logprobs(actor, randomly_routed(actor), Routing.REPLAY)
    return bool((live == own).all()), bool((np.abs(other - live) > 1e-3).mean() > 0.9)


@pytest.mark.ranks
def test_replay_of_own_routes_is_live_bit_for_bit_and_of_random_ones_is_not(
    checkpoint: Path,
) -> None:
    own_is_live, random_differs = in_one_rank(_own_routes, checkpoint)
    assert own_is_live
    assert random_differs


def _invalid_rows(checkpoint: Path) -> tuple[bool, bool]:
    actor = start_policy(checkpoint)
    samples = randomly_routed(actor)
    live = logprobs(actor, samples, Routing.LIVE)
    nothing_valid = [
        with_routes(s, s.trace.expert_ids, valid=np.zeros(len(s.token_ids), dtype=bool))
        for s in samples
    ]
    halves = []
    for s in samples:
        valid = np.arange(len(s.token_ids)) < 6
        halves.append(with_routes(s, s.trace.expert_ids, valid=valid))
    first_rows_only = logprobs(actor, halves, Routing.REPLAY)
    return (
        bool((logprobs(actor, nothing_valid, Routing.REPLAY) == live).all()),
        bool((first_rows_only == live).all()),
    )


@pytest.mark.ranks
def test_invalid_rows_are_routed_live_and_valid_ones_are_not(checkpoint: Path) -> None:
    invalid_are_live, all_are_live = in_one_rank(_invalid_rows, checkpoint)
    assert invalid_are_live
    assert not all_are_live


def _gradients_under(
    checkpoint: Path, recompute: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], float]:
    actor = start_policy(checkpoint, **recompute)
    samples = randomly_routed(actor)
    # A forward-only pass first: it must leave nothing behind that a recomputation could pick up
    # (defect E1).
    logprobs(actor, list(reversed(samples)), Routing.REPLAY)
    actor.optimizer.step = lambda: (True, 0.0, 0)
    calls = []
    for router in actor.routers.values():
        router.register_forward_hook(lambda *_: calls.append(1))
    batches = pack(samples)
    actor.update(batches, mean_loss, temperature=1.0, routing=Routing.REPLAY)
    return gradients(actor), len(calls) / (len(actor.routers) * len(batches))


RECOMPUTE = {
    "full_uniform": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 2,
    },
    "full_block": {
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": 3,
    },
    "selective_moe": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
}


@pytest.mark.ranks
@pytest.mark.parametrize("name", RECOMPUTE)
def test_recomputation_replays_the_routes_of_its_own_forward_pass(
    name: str, checkpoint: Path
) -> None:
    plain, calls = in_one_rank(_gradients_under, checkpoint, {})
    recomputed, calls_with_recompute = in_one_rank(_gradients_under, checkpoint, RECOMPUTE[name])
    assert calls == 1.0
    assert calls_with_recompute == (1.75 if name == "full_block" else 2.0)
    for parameter, gradient in plain.items():
        error = (recomputed[parameter] - gradient).norm() / (gradient.norm() + 1e-12)
        assert error < 1e-6, parameter


def _gradient_of_gate(checkpoint: Path, routing: str) -> float:
    actor = start_policy(checkpoint)
    samples = randomly_routed(actor)
    actor.optimizer.step = lambda: (True, 0.0, 0)
    actor.update(pack(samples), mean_loss, temperature=1.0, routing=Routing[routing])
    found = [
        g.norm().item() for name, g in gradients(actor).items() if name.endswith("mlp.gate.weight")
    ]
    assert len(found) == 4
    return min(found)


@pytest.mark.ranks
def test_router_keeps_its_gradient_for_experts_outside_the_live_top_k(checkpoint: Path) -> None:
    assert in_one_rank(_gradient_of_gate, checkpoint, "REPLAY") > 1e-4


def _after_an_exception(checkpoint: Path) -> tuple[bool, bool]:
    actor = start_policy(checkpoint)
    samples = randomly_routed(actor)
    before = logprobs(actor, samples, Routing.LIVE)

    def failing_loss(microbatch: Any, new_logprobs: torch.Tensor) -> torch.Tensor:
        raise KeyError("a loss that fails")

    with pytest.raises(KeyError):
        actor.update(pack(samples), failing_loss, temperature=1.0, routing=Routing.REPLAY)
    after = logprobs(actor, samples, Routing.LIVE)
    return bool((before == after).all()), all(
        router.router_replay is None for router in actor.routers.values()
    )


@pytest.mark.ranks
def test_scope_gives_the_routers_back_after_an_exception(checkpoint: Path) -> None:
    live_again, given_back = in_one_rank(_after_an_exception, checkpoint)
    assert live_again
    assert given_back


def _second_model(checkpoint: Path) -> bool:
    other = start_policy(checkpoint)
    actor = start_policy_again(checkpoint)
    samples = randomly_routed(actor)
    before = logprobs(other, samples, Routing.LIVE)
    routes = {0: _whole(pack(samples, max_tokens=1000)[0])}
    scope = ReplayScope(actor.routers, routes)
    with pytest.raises(ReplayScopeError, match="did not run exactly once"), scope.open():
        during = logprobs(other, samples, Routing.LIVE)
    return bool((before == during).all())


def start_policy_again(checkpoint: Path) -> MegatronActor:
    """Build a second policy in the world that exists."""
    from moe_replay.megatron.actor import build_policy
    from moe_replay.megatron.layout import ParallelLayout
    from moe_replay.testing.policies import SETTINGS

    return build_policy(
        checkpoint, ParallelLayout(), dtype=torch.float32, settings=SETTINGS, num_updates=10
    )


def _whole(microbatch: Microbatch, **changes: Any) -> RouteSlice:
    assert microbatch.routes is not None
    return replace(microbatch.routes, **changes)


@pytest.mark.ranks
def test_scope_leaves_every_other_model_of_the_process_alone(checkpoint: Path) -> None:
    assert in_one_rank(_second_model, checkpoint)


def _contract_breaches(checkpoint: Path) -> list[str]:
    actor = start_policy(checkpoint)
    batch = pack(randomly_routed(actor), max_tokens=1000)[0]
    routes = _whole(batch)

    def run(scope: ReplayScope | RecordScope, keys: list[int | None]) -> str:
        with pytest.raises(ReplayScopeError) as caught, scope.open(), torch.no_grad():
            for key in keys:
                if key is None:
                    actor._forward(actor.chunks[0], batch, None)
                else:
                    actor._forward(actor.chunks[0], replace(batch, key=key), scope)
        return str(caught.value)

    short = _whole(batch, valid=routes.valid[:-1], expert_ids=routes.expert_ids[:, :-1])
    return [
        run(ReplayScope(actor.routers, {0: routes}), [None]),
        run(ReplayScope(actor.routers, {0: routes}), [7]),
        run(ReplayScope(actor.routers, {0: routes}), [0, 0]),
        run(ReplayScope(actor.routers, {0: routes, 1: routes}), [0]),
        run(ReplayScope(actor.routers, {0: short}), [0]),
        run(RecordScope(actor.routers, [0, 1]), [0]),
    ]


@pytest.mark.ranks
def test_scope_names_each_breach_of_its_contract(checkpoint: Path) -> None:
    said = in_one_rank(_contract_breaches, checkpoint)
    expected = [
        "outside `scope.microbatch",
        "microbatch 7 has no routes",
        "which ran 2 times",
        "microbatch 1, which ran 0 times",
        "the routes have",
        "microbatch 1, which ran 0 times",
    ]
    for message, part in zip(said, expected, strict=True):
        assert part in message


def _refused_routes(checkpoint: Path) -> list[str]:
    actor = start_policy(checkpoint)
    batch = pack(randomly_routed(actor), max_tokens=1000)[0]
    whole = _whole(batch)
    ids = whole.expert_ids
    bad = [
        _whole(batch, expert_ids=ids[:, :, :3]),
        _whole(batch, expert_ids=ids.astype(np.int64)),
        _whole(batch, expert_ids=ids[:3], layers=whole.layers[:3]),
        _whole(batch, num_experts=32),
    ]
    messages = []
    for routes in bad:
        with pytest.raises(TraceError) as caught:
            ReplayScope(actor.routers, {0: routes})
        messages.append(str(caught.value))
    return messages


@pytest.mark.ranks
def test_scope_refuses_routes_of_another_model(checkpoint: Path) -> None:
    topk, dtype, layers, experts = in_one_rank(_refused_routes, checkpoint)
    assert "(16, 3, 'uint8')" in topk and "expected (16, 4, 'uint8')" in topk
    assert "(16, 4, 'int64')" in dtype
    assert "also routes in [3]" in layers
    assert "(32, 4, 'uint8')" in experts


def _refused_configs(checkpoint: Path) -> list[str]:
    actor = start_policy(checkpoint)
    config = actor.config
    messages = []
    for name, value in (
        ("moe_router_fusion", True),
        ("moe_expert_capacity_factor", 1.0),
        ("moe_router_topk", 16),
    ):
        before = getattr(config, name)
        setattr(config, name, value)
        with pytest.raises(UnsupportedError) as caught:
            RecordScope(actor.routers, [0])
        messages.append(str(caught.value))
        setattr(config, name, before)
    RecordScope(actor.routers, [0])
    with pytest.raises(UnsupportedError) as caught:
        RecordScope({}, [0])
    return [*messages, str(caught.value)]


@pytest.mark.ranks
def test_scope_refuses_routers_that_would_not_ask_it(checkpoint: Path) -> None:
    fusion, capacity, all_experts, dense = in_one_rank(_refused_configs, checkpoint)
    assert "moe_router_fusion" in fusion
    assert "capacity" in capacity
    assert "no choice to replay" in all_experts
    assert "no router on this rank" in dense


def _two_scopes(checkpoint: Path) -> str:
    actor = start_policy(checkpoint)
    first, second = RecordScope(actor.routers, []), RecordScope(actor.routers, [])
    with first.open(), pytest.raises(ReplayScopeError) as caught, second.open():
        raise AssertionError("two scopes own one router")
    return str(caught.value)


@pytest.mark.ranks
def test_a_router_belongs_to_one_scope_at_a_time(checkpoint: Path) -> None:
    assert "already belongs to an open scope" in in_one_rank(_two_scopes, checkpoint)


def _late_recomputation(checkpoint: Path) -> str:
    actor = start_policy(checkpoint, **RECOMPUTE["full_uniform"])
    batch = pack(randomly_routed(actor), max_tokens=1000)[0]
    for chunk in actor.chunks:
        chunk.train()
    scope = ReplayScope(actor.routers, {0: _whole(batch)})
    with scope.open():
        output = actor._forward(actor.chunks[0], batch, scope)
    with pytest.raises(ReplayScopeError) as caught:
        output.sum().backward()
    return str(caught.value)


@pytest.mark.ranks
def test_recomputation_after_the_scope_is_refused(checkpoint: Path) -> None:
    assert "after its replay scope was closed" in in_one_rank(_late_recomputation, checkpoint)


def _record_under_recompute(checkpoint: Path) -> bool:
    actor = start_policy(checkpoint, **RECOMPUTE["full_uniform"])
    samples = with_own_routes(actor, make_samples(4, seed=SEED))
    batches = pack(samples)
    scope = RecordScope(actor.routers, [batch.key for batch in batches])
    for chunk in actor.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    with scope.open():
        outputs = [actor._forward(actor.chunks[0], batch, scope) for batch in batches]
        # Backwards in reverse order: an older microbatch recomputes last and must not overwrite
        # anything.
        for output in reversed(outputs):
            output.sum().backward()
    return all(
        np.array_equal(scope.expert_ids(batch.key), _whole(batch).expert_ids) for batch in batches
    )


@pytest.mark.ranks
def test_recording_under_recomputation_keeps_the_forward_routes(checkpoint: Path) -> None:
    assert in_one_rank(_record_under_recompute, checkpoint)
