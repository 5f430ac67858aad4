"""Variants of families compute in Megatron what they compute in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe_replay.errors import UnsupportedError
from moe_replay.megatron.layout import ParallelLayout, initialize
from moe_replay.megatron.model import build_model, read_model_shape, transformer_config
from moe_replay.megatron.weights import load_hf_weights
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.tiny_models import write_tiny_checkpoint

ONE = ParallelLayout()
TOKENS = torch.randint(0, 100, (1, 16), generator=torch.Generator().manual_seed(7))


def logits_of(checkpoint: Path, **changed: torch.Tensor) -> torch.Tensor:
    initialize(ONE)
    shape = read_model_shape(checkpoint)
    (chunk,) = chunks = build_model(shape, transformer_config(shape, ONE))
    load_hf_weights(chunks, checkpoint)
    with torch.no_grad():
        for name, value in changed.items():
            chunk.state_dict()[name.replace("__", ".")].copy_(value)
        return chunk(TOKENS, torch.arange(TOKENS.shape[1])[None], None)[0]


YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
RELEASED_V2 = {
    "topk_method": "group_limited_greedy",
    "n_routed_experts": 160,
    "num_experts_per_tok": 6,
    "n_group": 8,
    "topk_group": 3,
    "moe_intermediate_size": 8,
}
VARIANTS = {
    "yarn": ("deepseek_v3", {"rope_parameters": YARN}),
    "whole query": ("deepseek_v3", {"q_lora_rank": None}),
    "one group": ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
    "groups by their best expert": (
        "deepseek_v2",
        {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 4},
    ),
    "the router of the released DeepSeek-V2": ("deepseek_v2", RELEASED_V2),
    "groups by their best two, one expert of each": ("deepseek_v3", {"topk_group": 4}),
    "norms over all heads, all of a head rotated": (
        "minimax_m2",
        {"rotary_dim": 32, "num_local_experts": 8},
    ),
    "every second layer, from the first on": (
        "ernie4_5_moe",
        {"moe_layer_start_index": 0, "moe_layer_interval": 2, "tie_word_embeddings": True},
    ),
    "windows in all layers, no scaling": (
        "gpt_oss",
        {
            "layer_types": ["sliding_attention"] * 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "sliding windows without sinks": (
        "dots1",
        {"sliding_window": 5, "max_window_layers": 1},
    ),
    "no shared experts": ("ernie4_5_moe", {"moe_num_shared_experts": 0}),
    "without query and key norm": ("glm4_moe", {"use_qk_norm": False, "attention_bias": False}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_transformers_in_variants_of_a_family(tmp_path, name):
    family, overrides = VARIANTS[name]
    path = write_tiny_checkpoint(tmp_path, family, num_hidden_layers=2, **overrides)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        expected = model(TOKENS).logits[0]
    (logits,) = run_ranks(logits_of, 1, path)
    assert (logits - expected).abs().max() < 2e-5


def test_logits_change_with_the_expert_bias(tmp_path):
    path = write_tiny_checkpoint(tmp_path, "deepseek_v3", num_hidden_layers=2)
    (logits,) = run_ranks(logits_of, 1, path)
    bias = torch.linspace(-1, 1, 16)
    (changed,) = run_ranks(
        lambda: logits_of(path, decoder__layers__1__mlp__router__expert_bias=bias), 1
    )
    assert (logits - changed).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("deepseek_v3", {"topk_group": 9}, "expected equal groups"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq = 2"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        ("deepseek_v2", {"topk_method": "greedy", "n_group": 8, "topk_group": 3}, "n_group = 8"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc'"),
        ("deepseek_v3", {"rope_parameters": {**YARN, "attention_factor": 2.0}}, "attention_factor"),
        ("deepseek_v3", {"norm_topk_prob": False}, "norm_topk_prob = False"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave = False"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias = True"),
        ("glm4_moe", {"rope_parameters": YARN}, "supported: rope_type 'default'"),
        ("ernie4_5_moe", {"use_bias": True}, "use_bias = True"),
        ("ernie4_5_moe", {"moe_norm_min": 0.1}, r"moe_norm_min = 0\.1"),
        (
            "dots1",
            {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
            "norm_topk_prob",
        ),
        ("gpt_oss", {"swiglu_alpha": 1.5}, r"swiglu_alpha = 1\.5"),
        ("gpt_oss", {"attention_bias": False}, "attention_bias = False"),
        (
            "gpt_oss",
            {"layer_types": ["chunked_attention"] * 36},
            "layer_types chunked_attention; supported: full_attention and sliding_attention",
        ),
        ("qwen3_next", {}, r"linear attention \(gated delta rule\)"),
        ("granitemoe", {}, "multipliers"),
        ("minimax_m2", {"router_jitter_noise": 0.1}, r"router_jitter_noise = 0\.1"),
        ("minimax_m2", {"use_qk_norm": False}, "use_qk_norm = False"),
        ("minimax_m2", {"attn_type_list": [1, 0]}, "linear attention"),
        (
            "qwen3_moe",
            {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.5,
                }
            },
            r"partial_rotary_factor = 0\.5, which this architecture does not read",
        ),
    ],
)
def test_a_config_without_an_exact_counterpart_is_refused(tmp_path, family, overrides, message):
    AutoConfig.for_model(family, **overrides).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=message):
        read_model_shape(tmp_path)


def test_logits_change_with_one_router_row(checkpoint):
    (logits,) = run_ranks(logits_of, 1, checkpoint)
    row = torch.zeros(16, 64)
    (changed,) = run_ranks(
        lambda: logits_of(checkpoint, decoder__layers__0__mlp__router__weight=row), 1
    )
    assert (logits - changed).abs().max() > 1e-2


def test_mixed_dense_and_moe_layers_equal_transformers(tmp_path):
    path = write_tiny_checkpoint(tmp_path, mlp_only_layers=[0])
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        expected = model(TOKENS).logits[0]
    (logits,) = run_ranks(logits_of, 1, path)
    assert (logits - expected).abs().max() < 2e-5
