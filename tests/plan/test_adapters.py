"""What a plan says of adapters: their matrices by hand, and what the frozen model is spared."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moe_replay.errors import UnsupportedError
from moe_replay.megatron.families.family import ModelShape
from moe_replay.plan.machine import read_machine
from moe_replay.plan.memory import plan_memory
from moe_replay.plan.options import check_options
from moe_replay.plan.trainer.adapters import adapter_weights
from moe_replay.recipe.recipe import Recipe
from moe_replay.recipe.sections.lora import LoraSection
from moe_replay.testing.layouts import layout

Shapes = Callable[[str], ModelShape]
EIGHT = read_machine(["gpus=8x80GB"])


def count(shape: ModelShape, *targets: str, layers: int = 1, **sizes: int) -> tuple[int, int]:
    """Return the numbers of a rank's adapters of rank 8: dense ones, and those of experts."""
    lora = LoraSection(rank=8, target_modules=targets or ("all-linear",))
    weights = adapter_weights(shape, layout(**sizes), lora, range(layers))
    dense, experts = (
        sum(w.total for w in weights if w.is_expert == is_expert) for is_expert in (False, True)
    )
    return dense, experts


def test_matrices_of_qwen3_30b_by_hand(shape: Shapes) -> None:
    """2,048 hidden, 32 heads of 128 over 4, 128 experts of 768."""
    model = shape("qwen3-30b-a3b")
    attention = 3 * 2048 + 4096 + 512 + 512 + 4096 + 2048
    expert = 2 * (2048 + 768) + 768 + 2048
    assert count(model) == (8 * attention, 8 * 128 * expert)
    # Outputs of q, k and v and inputs of o are cut; the other matrices are on both ranks.
    cut = 3 * 2048 + (4096 + 512 + 512 + 4096) // 2 + 2048
    assert count(model, tp=2, ep=4, etp=1) == (8 * cut, 8 * 32 * expert)
    assert count(model, "q_proj", layers=2) == (2 * 8 * (2048 + 4096), 0)
    assert count(model, "down_proj") == (0, 8 * 128 * (768 + 2048))


def test_down_projections_of_latent_attention_are_not_cut(shape: Shapes) -> None:
    """7,168 hidden, 1,536 and 512 + 64 compressed, 128 heads of 128 + 64 and 128 + 128."""
    model = shape("deepseek-v3")
    assert count(model, "kv_a_proj_with_mqa", tp=2, etp=1) == (8 * (7168 + 576), 0)
    assert count(model, "q_b_proj", tp=2, etp=1) == (8 * (1536 + 128 * 192 // 2), 0)


def test_a_name_that_the_model_lacks_is_refused(shape: Shapes) -> None:
    with pytest.raises(UnsupportedError, match=r"names q_b_proj, but a qwen3_moe checkpoint"):
        count(shape("qwen3-30b-a3b"), "q_b_proj")


def test_frozen_weights_have_neither_gradients_nor_moments(
    recipe: Callable[..., Recipe], shape: Shapes
) -> None:
    """By hand: 48 layers with 138,240 dense numbers that 8 ranks share, 16 experts' on each."""
    model = shape("qwen3-30b-a3b")
    adapted = recipe(lora={"rank": 8}, grpo={"beta": 0.1})
    check_options(adapted, model, EIGHT)
    held = plan_memory(adapted, model, EIGHT).trainer[0].resident
    whole = plan_memory(recipe(), model, EIGHT).trainer[0].resident
    dense, experts = 48 * 8 * 17_408, 48 * 8 * 16 * 8_448
    assert held.gradients == pytest.approx(4 * (dense + experts), rel=1e-3)
    assert held.optimizer == pytest.approx(12 * (dense / 8 + experts), rel=1e-3)
    assert held.weights - whole.weights == pytest.approx(2 * (dense + experts), rel=0.01)
    # The reference is the model without its adapters.
    assert held.reference == 0
