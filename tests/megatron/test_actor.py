"""Scoring and updating with the real Megatron-Core."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_replay.batch import Microbatch, Sample
from moe_replay.megatron.actor import MegatronActor
from moe_replay.megatron.replay.overlap import WatchedRoutes
from moe_replay.megatron.scorer import RouteWatch
from moe_replay.routing import Routing
from moe_replay.routing.guard import Guard, join_evidence, judge, summarise
from moe_replay.testing import samples as planted
from moe_replay.testing.policies import gradients, mean_loss, pack, start_policy, with_own_routes
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.samples import make_samples

SEED = 30


def _against_transformers(checkpoint: Path, temperature: float) -> tuple[float, float]:
    from transformers import AutoModelForCausalLM

    actor = start_policy(checkpoint)
    samples = make_samples(6, seed=SEED)
    scored = actor.score(pack(samples), temperature=temperature, routing=Routing.LIVE).samples
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    worst_logprob, worst_entropy = 0.0, 0.0
    for sample in samples:
        ids = torch.from_numpy(sample.token_ids.astype(np.int64))
        with torch.no_grad():
            logprobs = (model(ids[None]).logits[0] / temperature).log_softmax(-1)
        rows = logprobs[sample.prompt_length - 1 : -1]
        expected = rows.gather(1, ids[sample.prompt_length :, None])[:, 0].numpy()
        entropy = -(rows.exp() * rows).sum(-1).numpy()
        found = scored[sample.sample_id]
        worst_logprob = max(worst_logprob, float(np.abs(found.token_logprobs - expected).max()))
        worst_entropy = max(worst_entropy, float(np.abs(found.entropies - entropy).max()))
    return worst_logprob, worst_entropy


@pytest.mark.ranks
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_logprobs_and_entropies_equal_those_of_transformers(
    checkpoint: Path, temperature: float
) -> None:
    logprob_error, entropy_error = run_ranks(_against_transformers, 1, checkpoint, temperature)[0]
    assert logprob_error < 2e-5
    assert entropy_error < 2e-5


def _recorded(checkpoint: Path) -> list[tuple[Any, ...]]:
    actor = start_policy(checkpoint)
    samples = with_own_routes(actor, make_samples(3, seed=SEED))
    alone = [with_own_routes(actor, [sample])[0] for sample in samples]
    for sample, single in zip(samples, alone, strict=True):
        np.testing.assert_array_equal(
            np.sort(sample.trace.expert_ids), np.sort(single.trace.expert_ids)
        )
    trace = samples[0].trace
    assert trace is not None
    return [(trace.layers, trace.num_experts, trace.topk, trace.num_valid == len(trace))]


@pytest.mark.ranks
def test_recorded_routes_do_not_depend_on_the_packing_and_cover_every_row(checkpoint: Path) -> None:
    assert run_ranks(_recorded, 1, checkpoint)[0] == [((0, 1, 2, 3), 16, 4, True)]


def _judged(actor: MegatronActor, samples: list[Sample]) -> tuple[str, bool]:
    """Return what a guard says of a backward pass, and whether the weights are as before."""
    before = _weights(actor)
    seen: list[WatchedRoutes] = []
    actor.backward(
        pack(samples, max_tokens=512),
        mean_loss,
        temperature=1.0,
        routing=Routing.REPLAY,
        watch=RouteWatch(observe=lambda _, watched: seen.append(watched)),
    )
    guard, counts = Guard(), [watched.counts for watched in seen]
    baseline = guard.baseline([summarise(counts)])
    evidence = join_evidence([judge(part, baseline) for part in counts])
    verdict = guard.decide(baseline, [evidence], looks={})
    said = "" if verdict.is_clean else verdict.message("update")
    return said, bool((before == _weights(actor)).all())


def _judged_updates(checkpoint: Path) -> dict[str, tuple[str, bool]]:
    actor = start_policy(checkpoint)
    print("seed", SEED)
    samples = with_own_routes(actor, make_samples(12, seed=SEED, min_length=20, max_length=40))
    one = samples[5]
    cases = {
        "none": samples,
        "token +1": planted.shift_tokens(samples, 1),
        "token -1": planted.shift_tokens(samples, -1),
        "layer +1": planted.shift_layers(samples, 1),
        "layer -1": planted.shift_layers(samples, -1),
        "swap": planted.swap_samples(samples),
        "random": planted.randomise_routes(samples, seed=SEED),
        "one of 12": [*samples[:5], *planted.shift_tokens([one], 1), *samples[6:]],
    }
    return {name: _judged(actor, case) for name, case in cases.items()}


def _weights(actor: MegatronActor) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for m in actor.modules for p in m.parameters()])


@pytest.mark.ranks
def test_a_misaligned_update_shows_in_its_counts_before_any_weight_moves(checkpoint: Path) -> None:
    judged = run_ranks(_judged_updates, 1, checkpoint)[0]
    assert all(kept for _, kept in judged.values())
    said = {name: text for name, (text, _) in judged.items()}
    assert said["none"] == ""
    for name in ("token +1", "layer +1", "token -1", "layer -1"):
        kind, shift = name.split()
        # `shift_tokens(by=1)` gives a row the route of the row before, so that its own lies in the
        # next one.
        assert f"{kind} shift {shift}" in said[name] or f"'{name}'" in said[name]
    for name in ("swap", "random"):
        assert "hardly better than those of any other row" in said[name]
    assert "the routes of 1 of 12 samples" in said["one of 12"]
    assert "sample 5, positions" in said["one of 12"]


def _gradients_of_packing(checkpoint: Path, max_tokens: int) -> dict[str, torch.Tensor]:
    actor = start_policy(checkpoint)
    actor.optimizer.step = lambda: (True, 0.0, 0)
    samples = make_samples(6, seed=SEED)
    actor.update(
        pack(samples, max_tokens=max_tokens), mean_loss, temperature=1.0, routing=Routing.LIVE
    )
    return gradients(actor)


@pytest.mark.ranks
def test_gradient_does_not_depend_on_how_samples_are_packed(checkpoint: Path) -> None:
    whole = run_ranks(_gradients_of_packing, 1, checkpoint, 1000)[0]
    split = run_ranks(_gradients_of_packing, 1, checkpoint, 30)[0]
    for name, gradient in whole.items():
        assert (split[name] - gradient).norm() / (gradient.norm() + 1e-12) < 1e-5, name


def _update_in_data_parallel(checkpoint: Path, world_size: int) -> tuple[torch.Tensor, float]:
    actor = start_policy(checkpoint)
    samples = with_own_routes(actor, make_samples(8, seed=SEED))
    rank = torch.distributed.get_rank()
    share: list[Sample] = samples[rank * 8 // world_size : (rank + 1) * 8 // world_size]
    result = actor.update(pack(share), mean_loss, temperature=1.0, routing=Routing.REPLAY)
    return _weights(actor), result.norm


@pytest.mark.ranks
def test_update_over_two_data_parallel_ranks_equals_that_of_one(checkpoint: Path) -> None:
    ((alone, norm),) = run_ranks(_update_in_data_parallel, 1, checkpoint, 1)
    first, second = run_ranks(_update_in_data_parallel, 2, checkpoint, 2)
    assert torch.equal(first[0], second[0])
    assert first[1] == pytest.approx(norm, rel=1e-5)
    # Adam divides by the gradient's size, so a gradient of rounding noise moves a weight by up to
    # the learning rate.
    assert (first[0] - alone).abs().mean() < 1e-6


def _bf16_update(checkpoint: Path) -> tuple[bool, bool]:
    actor = start_policy(checkpoint, dtype=torch.bfloat16)
    samples = with_own_routes(actor, make_samples(6, seed=SEED))
    live = actor.score(pack(samples), temperature=1.0, routing=Routing.LIVE).samples
    replayed = actor.score(pack(samples), temperature=1.0, routing=Routing.REPLAY).samples
    same = all((live[i].token_logprobs == replayed[i].token_logprobs).all() for i in live)
    before = _weights(actor)
    actor.update(pack(samples), mean_loss, temperature=1.0, routing=Routing.REPLAY)
    return same, bool((before != _weights(actor)).float().mean() > 0.3)


@pytest.mark.ranks
def test_bfloat16_policy_replays_its_own_routes_exactly_and_learns(checkpoint: Path) -> None:
    same, learned = run_ranks(_bf16_update, 1, checkpoint)[0]
    assert same
    assert learned


def _unscored_microbatch(checkpoint: Path) -> Microbatch:
    actor = start_policy(checkpoint)
    batch = pack(make_samples(2, seed=SEED))[0]
    actor.score([replace(batch, key=5)], temperature=1.0, routing=Routing.REPLAY)
    return batch


@pytest.mark.ranks
def test_replay_without_routes_says_which_pass_should_have_recorded_them(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="has no routes to replay"):
        run_ranks(_unscored_microbatch, 1, checkpoint)


def _routes_of_a_larger_model(checkpoint: Path) -> None:
    actor = start_policy(checkpoint)
    samples = with_own_routes(actor, make_samples(2, seed=SEED))
    larger = [replace(sample, trace=replace(sample.trace, num_experts=32)) for sample in samples]
    actor.score(pack(larger), temperature=1.0, routing=Routing.REPLAY)


@pytest.mark.ranks
def test_routes_of_a_model_with_more_experts_are_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"\(32, 4, 'uint8'\).*expected \(16, 4, 'uint8'\)"):
        run_ranks(_routes_of_a_larger_model, 1, checkpoint)
