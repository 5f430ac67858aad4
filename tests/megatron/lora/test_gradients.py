"""Adapters learn what the chain rule says, in every layout."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_replay.megatron.actor import MegatronActor
from moe_replay.megatron.weights import load_hf_weights
from moe_replay.routing import Routing
from moe_replay.testing.layouts import FULL, layout
from moe_replay.testing.policies import gradients, mean_loss, start_policy
from moe_replay.testing.ranks import run_ranks

from . import adapter_cases
from .adapter_cases import SCALE, Step, adapted_step, drawn

pytestmark = pytest.mark.ranks
BOUND = 1e-5
"""Relative; float32 sums in another order."""


@cache
def alone(checkpoint: Path) -> Step:
    (step,) = run_ranks(adapted_step, 1, checkpoint, layout(), {})
    return step


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / (expected.norm() + 1e-12))


def matrices(base: str, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B as drawn of the projection with weight ``base``, by hand."""
    name = base.removesuffix(".weight")
    return (
        drawn(f"{name}.lora_A.weight", (4, shape[1])),
        drawn(f"{name}.lora_B.weight", (shape[0], 4)),
    )


def whole_weights_step(checkpoint: Path, adapted: set[str]) -> dict[str, Any]:
    """Train every weight of a model that has what adapters add in its weights."""
    actor = start_policy(checkpoint)
    merged = dict(actor.weights.tensors())
    for name in adapted:
        a, b = matrices(name, tuple(merged[name].shape))
        merged[name] = merged[name] + SCALE * b @ a
    load_hf_weights(actor.modules, merged)
    microbatches = adapter_cases.share(actor)
    found = adapter_cases.logprobs(actor, microbatches)
    adapter_cases.only_measure(actor)
    actor.update(microbatches, mean_loss, temperature=0.9, routing=Routing.LIVE)
    return {"logprobs": found, "gradients": gradients(actor), "merged": merged}


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "deepseek_v3"])
def test_gradients_are_those_of_the_merged_weights_by_the_chain_rule(
    checkpoints: dict[str, Path], family: str
) -> None:
    step = alone(checkpoints[family])
    adapted = {
        name.replace(".lora_A.weight", ".weight") for name in step.gradients if "lora_A" in name
    }
    assert any("experts.7.up_proj" in name for name in adapted)
    assert not any("gate.weight" in name or "embed" in name for name in adapted)
    (whole,) = run_ranks(whole_weights_step, 1, checkpoints[family], adapted)
    for sample_id, values in whole["logprobs"].items():
        assert np.abs(step.logprobs[sample_id] - values).max() < 2e-5
        assert np.abs(step.without[sample_id] - values).max() > 1e-2
    for name in adapted:
        of_weight = whole["gradients"][name]
        a, b = matrices(name, tuple(of_weight.shape))
        base = name.removesuffix(".weight")
        # y = (W + s B A) x: dA = s B^T dW, dB = s dW A^T.
        for matrix, expected in (
            ("lora_A", SCALE * b.t() @ of_weight),
            ("lora_B", SCALE * of_weight @ a.t()),
        ):
            found = step.gradients[f"{base}.{matrix}.weight"]
            assert relative(found, expected) < 2e-5, name
        assert relative(step.pushed[name], whole["merged"][name]) < 1e-6


LAYOUTS: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    "dp2": ("qwen3_moe", 2, {}, {}),
    "tp2 etp1": ("qwen3_moe", 2, {"tp": 2, "etp": 1}, {}),
    "latent tp2 ep2 etp1": ("deepseek_v3", 2, {"tp": 2, "ep": 2, "etp": 1}, {}),
    "ep2 grouped": ("qwen3_moe", 2, {"ep": 2}, {"grouped_experts": True}),
    "pp2 full recompute": ("qwen3_moe", 2, {"pp": 2}, FULL),
    "shared expert cp2": ("qwen2_moe", 2, {"cp": 2}, {}),
}


def assert_same(steps: list[Step], expected: Step) -> None:
    assert expected.grad_norm > 0
    for step in steps:
        assert step.grad_norm == pytest.approx(expected.grad_norm, rel=BOUND)
        assert step.gradients.keys() == expected.gradients.keys()
        for name, gradient in expected.gradients.items():
            assert relative(step.gradients[name], gradient) < BOUND, name
        for name, weight in expected.pushed.items():
            assert relative(step.pushed[name], weight) < 1e-6, name
        for kind in ("logprobs", "without"):
            for sample_id, values in getattr(step, kind).items():
                assert np.abs(values - getattr(expected, kind)[sample_id]).max() < 2e-5


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_equals_that_of_a_single_process(checkpoints: dict[str, Path], name: str) -> None:
    family, ranks, sizes, overrides = LAYOUTS[name]
    steps = run_ranks(adapted_step, ranks, checkpoints[family], layout(**sizes), overrides)
    assert_same(steps, alone(checkpoints[family]))


def forget_other_rows(actor: MegatronActor) -> None:
    """Leave out the sum over the ranks that hold other rows of the same sequences."""
    assert actor.adapters is not None
    for matrix in actor.adapters.matrices:
        matrix.part.sequence_parallel = False


def test_a_sum_that_is_left_out_shows(checkpoints: dict[str, Path]) -> None:
    checkpoint = checkpoints["qwen3_moe"]
    steps = run_ranks(adapted_step, 2, checkpoint, layout(tp=2, etp=1), {}, forget_other_rows)
    with pytest.raises(AssertionError):
        assert_same(steps, alone(checkpoint))
