"""A router's expert bias is the same float32 numbers on disk, in policy, engine and export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_replay.engines.embedded.engine import EmbeddedEngine
from moe_replay.megatron.actor import build_scorer
from moe_replay.megatron.checkpoint import CheckpointFolder, RunPosition
from moe_replay.megatron.chunks import unwrap
from moe_replay.megatron.layout import ParallelLayout
from moe_replay.megatron.scorer import MegatronScorer
from moe_replay.megatron.weights import export_hf_weights, save_hf_checkpoint
from moe_replay.routing import Routing
from moe_replay.testing.policies import mean_loss, pack, start_policy, with_own_routes
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.samples import make_samples
from moe_replay.testing.tiny_models import write_tiny_checkpoint

pytestmark = pytest.mark.ranks
SEED = 12
BIAS = "e_score_correction_bias"
Biases = dict[str, torch.Tensor]


def biases_of(tensors: Any) -> Biases:
    """Return the expert biases among named tensors, by layer."""
    return {name.split(".")[2]: value.clone() for name, value in tensors if name.endswith(BIAS)}


def in_model(scorer: MegatronScorer) -> Biases:
    return {str(layer): router.expert_bias.clone() for layer, router in scorer.routers.items()}


def assert_bits(found: Biases, expected: Biases) -> None:
    assert found.keys() == expected.keys()
    assert {bias.dtype for bias in found.values()} == {torch.float32}
    assert all(torch.equal(found[layer], bias) for layer, bias in expected.items())


def journey(checkpoint: Path, folder: Path) -> dict[str, Biases]:
    """Return the biases at every place that a bfloat16 run brings them to."""
    places: dict[str, Biases] = {}
    actor = start_policy(checkpoint, dtype=torch.bfloat16)
    places["policy"] = in_model(actor)
    places["pushed before any forward pass"] = biases_of(export_hf_weights(actor.modules))
    reference = build_scorer(checkpoint, ParallelLayout(), dtype=torch.bfloat16)
    places["reference"] = in_model(reference)
    samples = with_own_routes(actor, make_samples(4, seed=SEED))
    actor.update(pack(samples), mean_loss, temperature=1.0, routing=Routing.REPLAY)
    places["policy after an update"] = in_model(actor)
    engine = EmbeddedEngine(checkpoint, dtype="bfloat16")
    places["engine as loaded"] = biases_of(engine._model.named_buffers())
    engine.load_weights(export_hf_weights(actor.modules), policy_version=1)
    places["engine after a push"] = biases_of(engine._model.named_buffers())
    position = RunPosition(
        step=1,
        policy_version=1,
        next_prompt=0,
        identity={},
        scheduler=actor.scheduler.state_dict(),
    )
    checkpoints = CheckpointFolder(folder / "checkpoints", save_total_limit=1)
    checkpoints.save(actor, position)
    for router in actor.routers.values():
        router.expert_bias.fill_(torch.nan)
    checkpoints.load(actor, 1)
    places["policy after a resume"] = in_model(actor)
    save_hf_checkpoint(actor.modules, checkpoint, folder / "export")
    places["export"] = biases_of(load_file(folder / "export" / "model.safetensors").items())
    return places


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_t2_expert_bias_is_bit_equal_wherever_a_bfloat16_run_brings_it(
    tmp_path: Path, family: str
) -> None:
    path = write_tiny_checkpoint(
        tmp_path / "model", family, num_hidden_layers=2, dtype=torch.bfloat16
    )
    expected = biases_of(load_file(path / "model.safetensors").items())
    # What rounding would do to them is seen.
    assert expected
    assert all(not torch.equal(bias, bias.bfloat16().float()) for bias in expected.values())
    (places,) = run_ranks(journey, 1, path, tmp_path)
    assert len(places) == 8
    for place, found in places.items():
        print(place)
        assert_bits(found, expected)


def agreement(checkpoint: Path, rounded: bool) -> float:
    """Return the share of experts that a bfloat16 policy chooses as the float32 one does."""
    samples = make_samples(24, seed=SEED, min_length=20, max_length=40)
    exact = with_own_routes(start_policy(checkpoint), samples)
    scorer = build_scorer(checkpoint, ParallelLayout(), dtype=torch.bfloat16)
    if rounded:
        for router in scorer.routers.values():
            router.expert_bias.copy_(router.expert_bias.bfloat16())
    shared = [
        (a.trace.expert_ids[..., None] == b.trace.expert_ids[..., None, :]).any(axis=-1).ravel()
        for a, b in zip(exact, with_own_routes(scorer, samples), strict=True)
    ]
    return float(np.concatenate(shared).mean())


def test_t2_bfloat16_policy_chooses_the_experts_of_the_float32_one(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path, "deepseek_v3", dtype=torch.bfloat16)
    tensors = load_file(path / "model.safetensors")
    # As large as in released checkpoints: bfloat16 has steps of 1/16 there, and biases differ by
    # less.
    tensors |= {name: value / 2 + 11.9 for name, value in tensors.items() if name.endswith(BIAS)}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    print("seed", SEED)
    (kept,) = run_ranks(agreement, 1, path, False)
    (rounded,) = run_ranks(agreement, 1, path, True)
    assert kept > 0.975
    assert rounded < kept - 0.01


def test_t2_float32_buffers_of_every_kind_outlive_the_precision_wrapper(tmp_path: Path) -> None:
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    path = write_tiny_checkpoint(
        tmp_path, "deepseek_v3", num_hidden_layers=2, rope_parameters=rope, dtype=torch.bfloat16
    )

    def buffers(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        actor = start_policy(path, dtype=dtype)
        return dict(unwrap(actor.modules[0]).named_buffers())

    (exact,) = run_ranks(buffers, 1, torch.float32)
    (kept,) = run_ranks(buffers, 1, torch.bfloat16)
    names = {name.rpartition(".")[2] for name in exact}
    assert {"expert_bias", "local_tokens_per_expert", "cos_cached", "sin_cached"} <= names
    assert {name: buffer.dtype for name, buffer in kept.items()} == {
        name: buffer.dtype for name, buffer in exact.items()
    }
    assert all(torch.equal(kept[name], buffer) for name, buffer in exact.items())
