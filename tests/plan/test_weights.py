"""Parameters of a rank, counted from a config, are those of the built model."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from moe_replay.megatron.chunks import unwrap
from moe_replay.plan.trainer.weights import Weight, buffer_size, layer_weights, stage_weights
from moe_replay.recipe.sections.training import ParallelLayout
from moe_replay.testing.layouts import layout
from moe_replay.testing.policies import start_policy
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.tiny_models import FAMILIES, write_tiny_checkpoint

LAYOUTS = {
    "alone": (layout(), 1),
    "two replicas": (layout(), 2),
    "experts over 2": (layout(ep=2), 2),
    "two stages": (layout(pp=2), 2),
    "tensors and experts over 2": (layout(tp=2, ep=2, etp=1), 2),
    "experts cut in 2": (layout(tp=2, etp=2), 2),
}


def sizes_of(weights: list[Weight]) -> list[int]:
    return sorted(weight.size for weight in weights for _ in range(weight.count))


def built_and_counted(checkpoint, layout: ParallelLayout):
    actor = start_policy(checkpoint, layout)
    chunk = unwrap(actor.chunks[0])
    layers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
    stage = parallel_state.get_pipeline_model_parallel_rank()
    counted = stage_weights(chunk.model_shape, layout, layers, stage)
    parameters = [p.numel() for module in actor.modules for p in module.parameters()]
    ranks = dist.get_world_size()
    dense = ranks // layout.tensor_model_parallel_size // layout.pipeline_model_parallel_size
    wrapper = actor.chunks[0]
    buffers = [
        sum(buffer.grad_data.numel() for buffer in some)
        for some in (wrapper.buffers, wrapper.expert_parallel_buffers)
    ]
    expected = [
        buffer_size([w for w in counted if not w.is_expert], dense),
        buffer_size([w for w in counted if w.is_expert], ranks // layout.expert_parallel_size),
    ]
    return sorted(parameters), sizes_of(counted), buffers, expected


CASES = [
    *((family, "alone") for family in FAMILIES),
    *((family, "tensors and experts over 2") for family in FAMILIES),
    *(("qwen3_moe", name) for name in LAYOUTS if name != "alone"),
]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_parameters_and_buffers_are_those_of_the_built_model(tmp_path, family, name):
    sizes, ranks = LAYOUTS[name]
    checkpoint = write_tiny_checkpoint(tmp_path, family)
    for built, counted, buffers, expected in run_ranks(built_and_counted, ranks, checkpoint, sizes):
        assert built == counted
        assert buffers == expected


@pytest.mark.parametrize(
    ("name", "billions"),
    # As published, without prediction layers.
    [("qwen3-30b-a3b", 30.53), ("qwen3-235b-a22b", 235.1), ("deepseek-v3", 671.0)],
)
def test_real_models_have_the_published_number_of_parameters(shape, name, billions):
    model = shape(name)
    weights = stage_weights(model, ParallelLayout(), range(model.num_layers), 0)
    assert sum(w.total for w in weights) / 1e9 == pytest.approx(billions, rel=1e-3)


def test_a_layer_of_qwen3_30b_by_hand(shape):
    """32 + 8 heads of 128 x 2048 in, 32 out; 16 experts of 3 x 2048 x 768; two norms of heads."""
    by_name = {
        w.name: w.total
        for w in layer_weights(shape("qwen3-30b-a3b"), layout(ep=8, tp=4, etp=1), is_moe=True)
    }
    assert by_name == {
        "input_layernorm": 2048,
        "linear_proj": 32 * 128 * 2048 // 4,
        "linear_qkv": 40 * 128 * 2048 // 4,
        "q_layernorm": 128,
        "k_layernorm": 128,
        "pre_mlp_layernorm": 2048,
        "router": 128 * 2048,
        "experts.linear_fc1": 16 * 2 * 768 * 2048,
        "experts.linear_fc2": 16 * 768 * 2048,
    }


def test_a_buffer_is_padded_as_megatron_pads_it():
    """100 numbers begin at 0, the next 100 at 128; 228 are rounded up to 256, for 3 ranks 384."""
    two = [Weight(name="a", size=100), Weight(name="b", size=100)]
    assert buffer_size(two, 2) == 256
    assert buffer_size(two, 3) == 384
    assert buffer_size([], 2) == 0
