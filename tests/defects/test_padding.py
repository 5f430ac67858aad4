"""Defects by which padding counts: in the loads of experts, in what balances them.

Padding rows are routed live. They never count: not for the expert bias, not for the auxiliary loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_replay.batch import Microbatch, Sample, build_microbatch
from moe_replay.megatron.actor import MegatronActor
from moe_replay.megatron.replay import ReplayScope
from moe_replay.routing import Routing
from moe_replay.testing.layouts import coded_samples
from moe_replay.testing.policies import gradients, mean_loss, pack, shared, start_policy
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.samples import RoutedSample, make_samples
from moe_replay.testing.tiny_models import write_tiny_checkpoint

pytestmark = pytest.mark.ranks
NUM_EXPERTS, TOPK = 16, 4
LAYERS = (1, 2, 3)
SEED = 3
AUX_LOSS = {"moe_aux_loss_coeff": 5.0}


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a DeepSeek-V3 checkpoint: 4 layers, the first dense, routers with an expert bias."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("biased"), "deepseek_v3")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Qwen3-MoE checkpoint of 4 layers, the first dense."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("plain"), mlp_only_layers=[0])


def padded(samples: Sequence[Sample], actor: MegatronActor, multiple: int, key: int) -> Microbatch:
    """Return one microbatch of the samples, its rows a multiple of ``multiple``."""
    packed = build_microbatch(key, samples, place=actor.place, row_multiple=multiple)
    routed = [sample for sample in samples if isinstance(sample, RoutedSample)]
    return shared([packed], routed)[0] if routed else packed


def half_padding(samples: Sequence[Sample], actor: MegatronActor, key: int = 0) -> Microbatch:
    """Return one microbatch of which every second row is padding."""
    num_tokens = sum(len(sample.token_ids) for sample in samples)
    return padded(samples, actor, 2 * num_tokens, key)


def forwarded(actor: MegatronActor, microbatch: Microbatch) -> dict[int, Any]:
    """Run one replayed training pass; return layer -> (loads counted, what every row ran)."""
    assert microbatch.routes is not None
    ran: dict[int, Any] = {}
    hooks = [
        router.register_forward_hook(
            lambda _, __, output, layer=layer: ran.update({layer: output[1].numpy()})
        )
        for layer, router in actor.routers.items()
    ]
    for chunk in actor.chunks:
        chunk.train()
    scope = ReplayScope(actor.routers, {microbatch.key: microbatch.routes})
    with scope.open():
        actor._forward(actor.chunks[0], microbatch, scope)
    for hook in hooks:
        hook.remove()
    return {
        layer: (router.local_tokens_per_expert.numpy(), ran[layer])
        for layer, router in actor.routers.items()
    }


def _counted(checkpoint: Path, num_tokens: int, multiple: int, stock: bool) -> list[Any]:
    """Return for each layer the loads counted, and those of the rows with and without padding."""
    actor = start_policy(checkpoint)
    if stock:
        for router in actor.routers.values():
            del router._apply_expert_bias
    (first, *_) = coded_samples(LAYERS)
    sample = RoutedSample(
        sample_id=0,
        token_ids=first.token_ids[:num_tokens],
        prompt_length=4,
        rollout_logprobs=first.rollout_logprobs[: num_tokens - 4],
        advantage=1.0,
        trains=True,
        trace=first.trace.crop(0, num_tokens),
    )
    microbatch = padded([sample], actor, multiple, 0)
    is_token = microbatch.index.is_token
    return [
        (counted, ran[is_token].sum(axis=0), ran.sum(axis=0))
        for counted, ran in forwarded(actor, microbatch).values()
    ]


def test_c5_padding_is_left_out_of_the_loads_that_drive_the_expert_bias(biased):
    (found,) = run_ranks(_counted, 1, biased, 12, 24, False)
    for counted, of_tokens, of_rows in found:
        assert counted.sum() == 12 * TOPK
        assert counted.tolist() == of_tokens.tolist()
        assert counted.tolist() != of_rows.tolist()


def test_c5_control_megatrons_own_count_cannot_leave_padding_out(biased):
    with pytest.raises(RuntimeError, match=r"must match the size of tensor b"):
        run_ranks(_counted, 1, biased, 12, 24, True)


def test_e6_as_many_rows_as_experts_and_one_padding_row_leave_that_row_out(biased):
    (found,) = run_ranks(_counted, 1, biased, NUM_EXPERTS - 1, NUM_EXPERTS, False)
    for counted, of_tokens, _ in found:
        assert counted.tolist() == of_tokens.tolist()
        assert counted.sum() == (NUM_EXPERTS - 1) * TOPK


def test_e6_control_megatrons_own_count_leaves_the_last_expert_out_instead(biased):
    (found,) = run_ranks(_counted, 1, biased, NUM_EXPERTS - 1, NUM_EXPERTS, True)
    for counted, of_tokens, of_rows in found:
        assert counted[-1] == 0
        assert counted[:-1].tolist() == of_rows[:-1].tolist()
        assert counted.tolist() != of_tokens.tolist()


def _bias_moved_by(checkpoint: Path, rate: float) -> float:
    actor = start_policy(checkpoint, moe_router_bias_update_rate=rate)
    before = [router.expert_bias.clone() for router in actor.routers.values()]
    microbatches = pack(coded_samples(LAYERS), scorer=actor)
    actor.update(microbatches, mean_loss, temperature=1.0, routing=Routing.REPLAY)
    after = [router.expert_bias for router in actor.routers.values()]
    return max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True))


def test_c5_a_replayed_update_leaves_the_expert_bias_as_it_was_loaded(biased):
    assert run_ranks(_bias_moved_by, 1, biased, 0.0) == [0.0]


def test_c5_control_megatrons_default_rate_would_move_it(biased):
    assert run_ranks(_bias_moved_by, 1, biased, 1e-3) == [pytest.approx(1e-3, rel=1e-4)]


def _hottest(checkpoint: Path, one_id: bool) -> list[tuple[float, float]]:
    """Return each layer's load of the hottest expert over the mean: of tokens, of all rows."""
    actor = start_policy(checkpoint)
    microbatch = half_padding(make_samples(40, seed=SEED), actor)
    is_token = microbatch.index.is_token
    assert is_token.mean() == 0.5
    if one_id:
        ids = np.where(is_token, microbatch.token_ids, 0)
        microbatch = replace(microbatch, token_ids=ids)
    loads: list[tuple[float, float]] = []

    def note(_: Any, __: Any, output: Any) -> None:
        ran = output[1].numpy()
        tokens, rows = ran[is_token].sum(axis=0), ran.sum(axis=0)
        loads.append((tokens.max() / tokens.mean(), rows.max() / rows.mean()))

    for router in actor.routers.values():
        router.register_forward_hook(note)
    actor.score([microbatch], temperature=1.0, routing=Routing.LIVE)
    return loads


def test_c5_half_the_rows_padding_makes_no_expert_hot(checkpoint):
    (found,) = run_ranks(_hottest, 1, checkpoint, False)
    for of_tokens, of_rows in found:
        assert of_rows < 1.5 * of_tokens


def test_c5_control_padding_of_one_id_makes_some_experts_hot(checkpoint):
    (found,) = run_ranks(_hottest, 1, checkpoint, True)
    assert max(of_rows / of_tokens for of_tokens, of_rows in found) > 1.7


def _gradients(checkpoint: Path, padding: bool, masked: bool) -> dict[str, torch.Tensor]:
    actor = start_policy(checkpoint, **AUX_LOSS)
    samples = coded_samples(LAYERS)
    if not masked:
        actor._padding_mask = lambda *_: None
    microbatches = [
        half_padding(part, actor, key) if padding else padded(part, actor, 1, key)
        for key, part in enumerate((samples[:3], samples[3:]))
    ]
    actor.optimizer.step = lambda: (True, 0.0, 0)
    actor.update(microbatches, mean_loss, temperature=1.0, routing=Routing.REPLAY)
    return gradients(actor)


def gradient_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest relative error of a router's gradient."""
    return max(
        float((found[name] - gradient).norm() / gradient.norm())
        for name, gradient in expected.items()
        if name.endswith("mlp.gate.weight")
    )


def test_c5_padding_changes_nothing_in_the_auxiliary_loss(checkpoint):
    (plain,) = run_ranks(_gradients, 1, checkpoint, False, True)
    (half,) = run_ranks(_gradients, 1, checkpoint, True, True)
    assert gradient_error(half, plain) < 1e-5


def test_c5_control_without_a_mask_padding_would_be_balanced_too(checkpoint):
    (plain,) = run_ranks(_gradients, 1, checkpoint, False, True)
    (half,) = run_ranks(_gradients, 1, checkpoint, True, False)
    assert gradient_error(half, plain) > 0.05
