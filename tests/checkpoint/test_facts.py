"""What is read of a checkpoint is what the model built from it says."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_replay.checkpoint.facts import checkpoint_tensors, read_facts
from moe_replay.errors import CheckpointError, RecipeError
from moe_replay.testing.tiny_models import VOCAB_SIZE, write_tiny_checkpoint


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "mixtral", "olmoe"])
def test_every_family_is_read(tmp_path, family):
    facts = read_facts(write_tiny_checkpoint(tmp_path, family, num_hidden_layers=2))
    assert (facts.routed.moe_layers, facts.routed.num_decoder_layers) == ((0, 1), 2)
    assert (facts.routed.num_experts, facts.routed.topk) == (16, 4)
    assert (facts.vocab_size, facts.max_context_length, facts.eos_ids) == (VOCAB_SIZE, 512, (1,))
    on_disk = load_file(tmp_path / "model.safetensors")
    assert facts.weight_shapes == {name: tuple(t.shape) for name, t in on_disk.items()}


def test_dense_layers_are_no_moe_layers(tmp_path):
    path = write_tiny_checkpoint(tmp_path, num_hidden_layers=4, mlp_only_layers=[0, 2])
    assert read_facts(path).routed.moe_layers == (1, 3)


def test_a_language_model_inside_another_config_is_read(tmp_path):
    from transformers import AutoModelForCausalLM, Qwen3_5MoeConfig

    text = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
    }
    config = Qwen3_5MoeConfig(text_config=text)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    zeros = {name: torch.zeros(tensor.shape) for name, tensor in model.state_dict().items()}
    save_file(zeros, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(tmp_path)
    facts = read_facts(tmp_path)
    assert (facts.routed.num_experts, facts.routed.topk) == (4, 2)
    assert facts.weight_shapes.keys() == zeros.keys() == dict(checkpoint_tensors(tmp_path)).keys()


def test_tied_embeddings_are_seen(tmp_path):
    path = write_tiny_checkpoint(tmp_path / "tied", num_hidden_layers=1, tie_word_embeddings=True)
    assert read_facts(path).tied_names == {"lm_head.weight", "model.embed_tokens.weight"}
    path = write_tiny_checkpoint(tmp_path / "untied", num_hidden_layers=1)
    assert read_facts(path).tied_names == frozenset()


def test_e19_stop_tokens_are_those_of_both_configs(tmp_path):
    path = write_tiny_checkpoint(tmp_path, num_hidden_layers=1)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert read_facts(path).eos_ids == (7, 8, 1)


def test_e18_facts_tell_which_ids_pad_the_vocabulary(tmp_path):
    path = write_tiny_checkpoint(tmp_path, num_hidden_layers=1, vocab_size=VOCAB_SIZE + 5)
    assert (read_facts(path).vocab_size, read_facts(path).num_known_ids) == (
        VOCAB_SIZE + 5,
        VOCAB_SIZE,
    )


def test_shards_are_read_as_one_checkpoint(tmp_path):
    whole = write_tiny_checkpoint(tmp_path / "whole", num_hidden_layers=2)
    parts = write_tiny_checkpoint(tmp_path / "parts", num_hidden_layers=2, max_shard_size="200KB")
    assert len(list(parts.glob("*.safetensors"))) > 1
    assert read_facts(parts).weight_shapes == read_facts(whole).weight_shapes
    ours, theirs = dict(checkpoint_tensors(parts)), load_file(whole / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_folder_that_is_no_checkpoint_raises(tmp_path):
    with pytest.raises(RecipeError, match=r"no config\.json"):
        read_facts(tmp_path)


def test_a_missing_shard_raises(tmp_path):
    path = write_tiny_checkpoint(tmp_path, num_hidden_layers=1)
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors"):
        read_facts(path)
