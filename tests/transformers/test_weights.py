import pytest
import torch
from safetensors.torch import load_file

from moe_replay.testing.tiny_models import write_tiny_checkpoint
from moe_replay.transformers.weights import checkpoint_views


@pytest.fixture(scope="module")
def dirs(tmp_path_factory):
    root = tmp_path_factory.mktemp("weights")
    return [write_tiny_checkpoint(root / str(s), seed=s, num_hidden_layers=2) for s in (0, 1)]


@pytest.fixture
def model(dirs):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(dirs[0])


@pytest.fixture
def push(dirs):
    return load_file(dirs[1] / "model.safetensors")


def copy(push, model):
    views = checkpoint_views(model)
    assert views.keys() == push.keys()
    with torch.no_grad():
        for name, tensor in push.items():
            views[name].copy_(tensor)


def test_a_push_leaves_the_state_of_the_other_checkpoint(model, dirs, push):
    from transformers import AutoModelForCausalLM

    copy(push, model)
    expected = AutoModelForCausalLM.from_pretrained(dirs[1]).state_dict()
    held = model.state_dict()
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[name], expected[name]) for name in expected)


def test_a_push_keeps_the_memory_of_the_model(model, push):
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    copy(push, model)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before


def test_values_are_cast_to_the_dtype_of_the_model(model, push):
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    model.bfloat16()
    copy(push, model)
    # Gate and up projections lie one after the other in the fused tensor.
    held = model.state_dict()["model.layers.1.mlp.experts.gate_up_proj"][3].chunk(2)[1]
    assert torch.equal(held, push[name].bfloat16())
