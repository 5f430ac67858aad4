"""A model that exists only as a config shows what its payloads look like."""

import pytest

from moe_replay.checkpoint.facts import read_facts
from moe_replay.errors import RecipeError, TraceError, UnsupportedError
from moe_replay.routing import RoutedModel


def config(**changes):
    from transformers import DeepseekV3Config

    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 16,
        "moe_intermediate_size": 8,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "n_routed_experts": 300,
        "num_experts_per_tok": 5,
        "first_k_dense_replace": 2,
        "n_group": 1,
        "topk_group": 1,
    }
    return DeepseekV3Config(**sizes | changes)


def test_d16_a_config_tells_layers_experts_and_topk():
    assert RoutedModel.from_config(config()) == RoutedModel(
        moe_layers=(2, 3), num_decoder_layers=4, num_experts=300, topk=5
    )


def test_d16_a_folder_tells_the_same_as_its_checkpoint(family_dirs):
    folder = family_dirs["mixtral"]
    expected = read_facts(folder).routed
    assert expected is not None
    assert RoutedModel.from_config(folder) == RoutedModel.from_config(str(folder)) == expected


def test_d16_control_what_routes_nothing_or_is_no_model_is_named(tmp_path):
    from transformers import LlamaConfig, ViTConfig

    tiny = LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    with pytest.raises(TraceError, match="LlamaConfig describes a dense model"):
        RoutedModel.from_config(tiny)
    with pytest.raises(RecipeError, match=r"holds no config.json"):
        RoutedModel.from_config(tmp_path)
    with pytest.raises(UnsupportedError, match="no language model from a ViTConfig"):
        RoutedModel.from_config(ViTConfig())
