import pytest
import torch
from safetensors.torch import load_file

from moe_replay.errors import EngineError
from moe_replay.testing.tiny_models import write_tiny_checkpoint
from moe_replay.transformers.weights import CheckpointViews


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


def test_a_push_leaves_the_state_of_the_other_checkpoint(model, dirs, push):
    from transformers import AutoModelForCausalLM

    CheckpointViews(model).copy(push.items())
    expected = AutoModelForCausalLM.from_pretrained(dirs[1]).state_dict()
    held = model.state_dict()
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[name], expected[name]) for name in expected)


def test_a_push_keeps_the_memory_of_the_model(model, push):
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    CheckpointViews(model).copy(push.items())
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before


def test_values_are_cast_to_the_dtype_of_the_model(model, push):
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    model.bfloat16()
    CheckpointViews(model).copy(push.items())
    # Gate and up projections lie one after the other in the fused tensor.
    held = model.state_dict()["model.layers.1.mlp.experts.gate_up_proj"][3].chunk(2)[1]
    assert torch.equal(held, push[name].bfloat16())


def test_a_name_pushed_twice_raises(model, push):
    name = "model.norm.weight"
    with pytest.raises(EngineError, match=f"{name} was pushed twice"):
        CheckpointViews(model).copy([(name, push[name]), (name, push[name])])


def test_missing_names_are_counted_and_named(model, push):
    del push["model.norm.weight"], push["model.layers.0.mlp.experts.3.up_proj.weight"]
    with pytest.raises(EngineError, match=r"2 of \d+ weights.*experts\.3\.up_proj.*model\.norm"):
        CheckpointViews(model).copy(push.items())


def test_names_of_memory_are_unknown(model, push):
    fused = "model.layers.0.mlp.experts.gate_up_proj"
    with pytest.raises(EngineError, match=f"{fused} is not in this model's checkpoint"):
        CheckpointViews(model).copy([*push.items(), (fused, torch.zeros(1))])


def test_tied_weights_may_come_twice_if_they_are_equal(tmp_path):
    from transformers import AutoModelForCausalLM

    path = write_tiny_checkpoint(tmp_path, num_hidden_layers=1, tie_word_embeddings=True)
    push = load_file(path / "model.safetensors")
    embedding = push["model.embed_tokens.weight"]
    views = CheckpointViews(AutoModelForCausalLM.from_pretrained(path))
    views.copy([*push.items(), ("lm_head.weight", embedding)])
    with pytest.raises(EngineError, match=r"model\.embed_tokens\.weight and lm_head\.weight"):
        views.copy([*push.items(), ("lm_head.weight", embedding + 1)])
