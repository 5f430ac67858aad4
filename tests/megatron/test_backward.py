"""A gradient that is not finite is found before the optimizer moves; its microbatch is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_replay.batch import Microbatch, Sample
from moe_replay.errors import DivergedError, UpdateError
from moe_replay.megatron.actor import MegatronActor, build_policy
from moe_replay.megatron.backward import TokenLoss
from moe_replay.megatron.chunks import unwrap
from moe_replay.megatron.layout import ParallelLayout, initialize
from moe_replay.routing import Routing
from moe_replay.testing.layouts import layout
from moe_replay.testing.policies import SETTINGS, mean_loss, pack, start_policy
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.samples import make_samples

pytestmark = pytest.mark.ranks
SEED = 30


def _state(actor: MegatronActor) -> list[torch.Tensor]:
    """Return everything that a step changes: weights and Adam's moments."""
    weights = [p.detach().clone() for m in actor.modules for p in m.parameters()]
    moments = [
        value.clone()
        for part in actor.optimizer.chained_optimizers
        for state in part.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    return weights + moments


def _refused(actor: MegatronActor, packed: list[Microbatch], loss: TokenLoss) -> tuple[str, bool]:
    """Return what the update said, and whether it left everything as it was."""
    before = _state(actor)
    said = ""
    try:
        actor.update(packed, loss, temperature=1.0, routing=Routing.LIVE)
    except (DivergedError, UpdateError) as error:
        said = str(error)
    after = _state(actor)
    return said, all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _poison(sample_id: int) -> TokenLoss:
    """Return a finite loss whose gradient is NaN in one sample: the square root of 0."""

    def loss(microbatch: Microbatch, logprobs: torch.Tensor) -> torch.Tensor:
        owners = torch.from_numpy(microbatch.sample_ids[microbatch.predicts_sampled])
        nothing = torch.sqrt((logprobs * 0.0)[owners == sample_id]).sum()
        assert torch.isfinite(nothing)
        return mean_loss(microbatch, logprobs) + nothing

    return loss


def _break_a_layer(actor: MegatronActor, key: int) -> TokenLoss:
    """Make a layer's gradient infinite in microbatch ``key``; return a loss that sees it run."""
    running = {}

    def loss(microbatch: Microbatch, logprobs: torch.Tensor) -> torch.Tensor:
        running["key"] = microbatch.key
        return mean_loss(microbatch, logprobs)

    def overflow(gradient: torch.Tensor) -> torch.Tensor:
        return gradient / 0.0 if running["key"] == key else gradient

    def listen(module: Any, args: Any, output: Any) -> None:
        output[0].register_hook(overflow)

    layers: Any = unwrap(actor.chunks[0]).decoder.layers
    layers[1].mlp.register_forward_hook(listen)
    return loss


def _single(checkpoint: Path) -> dict[str, Any]:
    actor = start_policy(checkpoint)
    packed = pack(make_samples(32, seed=SEED), max_tokens=100)
    culprit = 17
    held = next(m for m in packed if culprit in [s.sample_id for s in m.samples])
    found: dict[str, Any] = {"key": held.key}
    found["first"] = _refused(actor, packed, _poison(culprit))
    with torch.no_grad():
        found["off"] = _refused(actor, packed, mean_loss)
    found["clean"] = _refused(actor, packed, mean_loss)
    # With Adam's moments in place.
    found["loss"] = _refused(actor, packed, _poison(culprit))
    found["layer"] = _refused(actor, packed, _break_a_layer(actor, held.key))
    # Each term is finite, the square of the norm is not.
    found["large"] = _refused(actor, packed, lambda m, logprobs: mean_loss(m, logprobs) * 1e30)
    return found


def test_t11_a_gradient_that_is_not_finite_is_refused_and_its_sample_named(
    checkpoint: Path,
) -> None:
    (found,) = run_ranks(_single, 1, checkpoint)
    for name in ("first", "loss"):
        said, kept = found[name]
        assert kept
        assert "norm of the gradient is nan" in said
        assert f"rank 0: microbatch {found['key']}: sample 17: gradient of the loss not fin" in said
    said, kept = found["layer"]
    assert kept
    assert f"rank 0: microbatch {found['key']}: one of samples" in said
    assert "first broken gradient: " in said
    said, kept = found["large"]
    assert kept
    assert "norm of the gradient is inf" in said
    assert "no microbatch alone" in said
    said, kept = found["off"]
    assert kept
    assert "torch.set_grad_enabled(False)" in said
    assert found["clean"] == ("", False)


def _one_of_two(checkpoint: Path) -> tuple[str, bool]:
    actor = start_policy(checkpoint)
    for part in actor.optimizer.chained_optimizers:
        part.config.clip_grad = 0.0
    share: list[Sample] = make_samples(8, seed=SEED)[dist.get_rank() :: 2]
    poisoned = _poison(5) if dist.get_rank() == 1 else mean_loss
    return _refused(actor, pack(share, max_tokens=1000), poisoned)


def test_t11_every_rank_refuses_what_one_replica_broke(checkpoint: Path) -> None:
    first, second = run_ranks(_one_of_two, 2, checkpoint)
    assert first == second
    said, kept = first
    assert kept
    assert "rank 1: microbatch 0: sample 5" in said
    assert "rank 0" not in said


def _interleaved(checkpoint: Path) -> tuple[str, bool]:
    actor = start_policy(checkpoint, layout(pp=2, vpp=2))
    packed = pack(make_samples(8, seed=SEED), max_tokens=1000, scorer=actor, count=4)
    culprit = next(m for m in packed if m.key == 3).samples[0].sample_id
    said, kept = _refused(actor, packed, _poison(culprit))
    return said.replace(f"sample {culprit}:", "sample C:"), kept


def test_t11_an_interleaved_pipeline_names_the_round(checkpoint: Path) -> None:
    first, second = run_ranks(_interleaved, 2, checkpoint)
    assert first == second
    said, kept = first
    assert kept
    assert "rank 1: microbatch 2, 3: sample C: gradient of the loss not finite" in said
    assert "microbatch 0" not in said


def _rates(checkpoint: Path, steps: int, warmup: int, skipped: int) -> list[float]:
    initialize(ParallelLayout())
    settings = SETTINGS.model_copy(update={"lr": 1.0, "warmup_steps": warmup})
    actor = build_policy(
        checkpoint, ParallelLayout(), dtype=torch.float32, settings=settings, num_updates=steps
    )
    packed = pack(make_samples(2, seed=SEED))
    rates = []
    for number in range(steps):
        if number == skipped:
            actor.skip()
            continue
        before = _state(actor)[0]
        rates.append(actor.learning_rate)
        actor.update(packed, mean_loss, temperature=1.0, routing=Routing.LIVE)
        assert not torch.equal(before, _state(actor)[0])
    return rates


def test_t13_the_first_warm_up_update_learns_and_a_skipped_one_uses_up_its_rate(
    checkpoint: Path,
) -> None:
    (rates,) = run_ranks(_rates, 1, checkpoint, 5, 3, 1)
    assert rates == pytest.approx([1 / 4, 3 / 4, 1.0, 1.0])
