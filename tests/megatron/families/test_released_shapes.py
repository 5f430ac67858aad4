"""Configs of released models are read, and the documented refusals name the config's field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_replay.errors import UnsupportedError
from moe_replay.megatron.layout import ParallelLayout
from moe_replay.megatron.model import read_model_shape, transformer_config

_DEEPSEEK: dict[str, Any] = {
    "moe_layer_freq": 1,
    "ep_size": 1,
    "seq_aux": True,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"},
}
_YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
RELEASED: dict[str, dict[str, Any]] = {
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 48,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "max_window_layers": 48,
        "attention_bias": False,
    },
    "Qwen1.5-MoE-A2.7B": {
        "model_type": "qwen2_moe",
        "num_hidden_layers": 24,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "max_window_layers": 21,
    },
    "Mixtral-8x7B": {
        "model_type": "mixtral",
        "num_hidden_layers": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "OLMoE-1B-7B": {
        "model_type": "olmoe",
        "num_hidden_layers": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "clip_qkv": None,
        "norm_topk_prob": False,
    },
    "DeepSeek-V2": {
        **_DEEPSEEK,
        "model_type": "deepseek_v2",
        "num_hidden_layers": 60,
        "n_routed_experts": 160,
        "num_experts_per_tok": 6,
        "n_shared_experts": 2,
        "n_group": 8,
        "topk_group": 3,
        "topk_method": "group_limited_greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 16.0,
        "first_k_dense_replace": 1,
        "rope_scaling": _YARN,
    },
    "DeepSeek-V3": {
        **_DEEPSEEK,
        "model_type": "deepseek_v3",
        "num_hidden_layers": 61,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "n_group": 8,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 3,
        "num_nextn_predict_layers": 1,
        "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "GLM-4.5-Air": {
        "model_type": "glm4_moe",
        "num_hidden_layers": 46,
        "n_routed_experts": 128,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "partial_rotary_factor": 0.5,
        "rope_scaling": None,
        "first_k_dense_replace": 1,
        "attention_bias": True,
        "use_qk_norm": False,
    },
}
_GLM_4_5 = {
    **RELEASED["GLM-4.5-Air"],
    "num_hidden_layers": 92,
    "n_routed_experts": 160,
    "hidden_size": 5120,
    "first_k_dense_replace": 3,
    "num_attention_heads": 96,
    "num_nextn_predict_layers": 1,
    "use_qk_norm": True,
}
RELEASED |= {
    "GLM-4.5": _GLM_4_5,
    "GLM-4.6": {**_GLM_4_5, "max_position_embeddings": 202752},
    "GLM-4.7-Flash": {
        "model_type": "glm4_moe_lite",
        "num_hidden_layers": 47,
        "n_routed_experts": 64,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.8,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 1,
        "partial_rotary_factor": 1.0,
        "rope_scaling": None,
        "rope_theta": 1000000,
    },
    "MiniMax-M2": {
        "model_type": "minimax_m2",
        "num_hidden_layers": 62,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
        "attn_type_list": [1] * 62,
        "qk_norm_type": "per_layer",
        "use_qk_norm": True,
        "use_routing_bias": True,
        "scoring_func": "sigmoid",
        "shared_intermediate_size": 0,
        "head_dim": 128,
        "rotary_dim": 64,
        "rope_theta": 5000000,
        "sliding_window": None,
        "use_mtp": True,
        "num_mtp_modules": 3,
    },
    "ERNIE-4.5-21B-A3B": {
        "model_type": "ernie4_5_moe",
        "num_hidden_layers": 28,
        "moe_num_experts": 64,
        "moe_k": 6,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 27,
        "moe_layer_interval": 1,
        "moe_capacity": [64, 64, 64],
        "moe_gate": "topk",
        "moe_use_aux_free": True,
        "num_nextn_predict_layers": 1,
        "rope_theta": 500000,
        "use_bias": False,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "num_hidden_layers": 24,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "experts_per_token": 4,
        "attention_bias": True,
        "head_dim": 64,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "initial_context_length": 4096,
        "rope_theta": 150000,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
    },
    "dots.llm1": {
        "model_type": "dots1",
        "num_hidden_layers": 62,
        "n_routed_experts": 128,
        "num_experts_per_tok": 6,
        "n_shared_experts": 2,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "scoring_func": "noaux_tc",
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "routed_scaling_factor": 2.5,
        "sliding_window": None,
        "rope_theta": 10000000,
        "attention_bias": False,
    },
}
FIRST_MOE_LAYER = {"ERNIE-4.5-21B-A3B": 1}
# Model -> changes of its config, each with the field that the refusal names.
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("Qwen3-30B-A3B", {"attention_bias": True}, "attention_bias = True"),
    ("Qwen3-30B-A3B", {"use_sliding_window": True}, "use_sliding_window = True"),
    ("Qwen3-30B-A3B", {"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_parameters"),
    ("Qwen3-30B-A3B", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ("Qwen3-30B-A3B", {"attention_dropout": 0.1}, r"attention_dropout = 0\.1"),
    ("Qwen1.5-MoE-A2.7B", {"use_sliding_window": True}, "use_sliding_window = True"),
    ("Mixtral-8x7B", {"sliding_window": 4096}, "sliding_window = 4096"),
    ("Mixtral-8x7B", {"router_jitter_noise": 0.1}, r"router_jitter_noise = 0\.1"),
    ("OLMoE-1B-7B", {"clip_qkv": 8.0}, r"clip_qkv = 8\.0"),
    ("OLMoE-1B-7B", {"attention_bias": True}, "attention_bias = True"),
    ("DeepSeek-V2", {"norm_topk_prob": True}, "norm_topk_prob = True"),
    ("DeepSeek-V2", {"mlp_bias": True}, "mlp_bias = True"),
    ("DeepSeek-V2", {"topk_method": "greedy"}, "n_group = 8"),
    ("DeepSeek-V2", {"rope_scaling": {**_YARN, "attention_factor": 2.0}}, "attention_factor"),
    ("DeepSeek-V3", {"norm_topk_prob": False}, "norm_topk_prob = False"),
    ("DeepSeek-V3", {"rope_interleave": False}, "rope_interleave = False"),
    ("DeepSeek-V3", {"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
    ("DeepSeek-V3", {"moe_layer_freq": 2}, "moe_layer_freq = 2"),
    ("DeepSeek-V3", {"quantization_config": {"quant_method": "fp8"}}, "quantized checkpoint"),
    ("GLM-4.6", {"norm_topk_prob": False}, "norm_topk_prob = False"),
    ("MiniMax-M2", {"qk_norm_type": "per_head"}, "qk_norm_type = 'per_head'"),
    ("MiniMax-M2", {"quantization_config": {"quant_method": "fp8"}}, "quantized checkpoint"),
    ("gpt-oss-20b", {"quantization_config": {"quant_method": "mxfp4"}}, "quantized checkpoint"),
    ("dots.llm1", {"attention_bias": True}, "attention_bias = True"),
    ("ERNIE-4.5-21B-A3B", {"rope_scaling": _YARN}, "rope_parameters"),
    ("GLM-4.5-Air", {"norm_topk_prob": False}, "norm_topk_prob = False"),
    ("GLM-4.5-Air", {"rope_scaling": _YARN}, "rope_parameters"),
]


def write(folder: Path, model: str, **changed: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**RELEASED[model], **changed}))
    return folder


@pytest.mark.parametrize("model", RELEASED)
def test_t22_the_config_of_a_released_model_is_taken_by_megatron(tmp_path, model):
    config = RELEASED[model]
    shape = read_model_shape(write(tmp_path, model))
    first = config.get("first_k_dense_replace", FIRST_MOE_LAYER.get(model, 0))
    assert shape.moe_layers == tuple(range(first, config["num_hidden_layers"]))
    assert shape.topk == config.get("num_experts_per_tok", config.get("moe_k"))
    made = transformer_config(shape, ParallelLayout())
    assert made.num_moe_experts == shape.num_experts


def test_t22_deepseek_v2_is_chosen_by_our_groups_and_v3_by_megatrons(tmp_path):
    v2 = read_model_shape(write(tmp_path, "DeepSeek-V2"))
    assert v2.expert_groups is not None
    assert "moe_router_num_groups" not in v2.megatron_fields
    v3 = read_model_shape(write(tmp_path, "DeepSeek-V3"))
    assert v3.expert_groups is None
    assert v3.megatron_fields["moe_router_num_groups"] == 8


@pytest.mark.parametrize(("model", "changed", "message"), REFUSED)
def test_t22_a_field_that_changes_the_arithmetic_is_refused_by_name(
    tmp_path, model, changed, message
):
    with pytest.raises(UnsupportedError, match=message):
        read_model_shape(write(tmp_path, model, **changed))
