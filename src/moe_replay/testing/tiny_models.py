"""Tiny MoE checkpoints in Hugging Face format, written locally, for tests and examples.

In: a family name and a seed. Out: a directory that transformers, vLLM and `moe_replay.megatron` can
load.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")
CHARACTERS = (*map(chr, range(32, 127)), "\n")
_EXPERT_BIAS = "e_score_correction_bias"
VOCAB_SIZE = len(SPECIAL_TOKENS) + len(CHARACTERS)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_DENSE_FIRST: dict[str, Any] = {
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "moe_intermediate_size": 32,
    "intermediate_size": 128,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}
_LATENT: dict[str, Any] = _DENSE_FIRST | {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "num_experts": 16,
        "moe_intermediate_size": 32,
        "intermediate_size": 128,
        "head_dim": 32,
        "norm_topk_prob": True,
    },
    "qwen2_moe": {
        "num_experts": 16,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "intermediate_size": 128,
    },
    "mixtral": {"num_local_experts": 16, "intermediate_size": 32},
    "olmoe": {"num_experts": 16, "intermediate_size": 32},
    "deepseek_v2": _LATENT
    | {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
    "deepseek_v3": _LATENT | {"n_group": 4, "topk_group": 2, "num_nextn_predict_layers": 0},
    "gpt_oss": {
        "num_local_experts": 16,
        "intermediate_size": 32,
        "head_dim": 32,
        "sliding_window": 4,
        "swiglu_limit": 2.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 128,
        },
    },
    "glm4_moe_lite": _LATENT | {"num_nextn_predict_layers": 0, "rms_norm_eps": 1e-6},
    "dots1": _DENSE_FIRST
    | {
        "head_dim": 32,
        "norm_topk_prob": True,
        "n_group": 4,
        "topk_group": 2,
        "sliding_window": None,
    },
    "minimax_m2": {
        "num_local_experts": 16,
        "intermediate_size": 32,
        "head_dim": 32,
        "rotary_dim": 16,
    },
    "ernie4_5_moe": {
        "moe_num_experts": 16,
        "moe_k": 4,
        "moe_intermediate_size": 32,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "intermediate_size": 128,
    },
    "glm4_moe": _DENSE_FIRST
    | {
        "head_dim": 32,
        "attention_bias": True,
        "use_qk_norm": True,
        "num_nextn_predict_layers": 0,
    },
}
FAMILIES = tuple(_FAMILIES)


def write_tiny_checkpoint(
    path: str | Path,
    family: str = "qwen3_moe",
    *,
    seed: int = 0,
    initializer_range: float = 0.2,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> Path:
    """Write config, safetensors and character tokenizer of a random model into `path`.

    The default `initializer_range` is ten times the usual one: with usual weights all experts and
    all router logits of an untrained model are nearly alike, and wrong routes would change nothing
    that a test could see. The norm weights and expert biases are random too, so that one loaded
    into the wrong place shows. As in released checkpoints, the expert biases are float32 whatever
    `dtype` is. `overrides` are fields of the family's transformers config.

    Examples:
        >>> write_tiny_checkpoint(tmp_path, num_hidden_layers=2, num_experts=32)
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {**_COMMON, **_FAMILIES[family], "initializer_range": initializer_range, **overrides}
    config = AutoConfig.for_model(family, **fields)
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=False
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Stacked biases of experts have two dims.
                if parameter.dim() == 1 or name.endswith("proj_bias"):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            for _, bias in _expert_biases(model):
                bias.add_(torch.randn_like(bias) * 0.1)
    finally:
        torch.set_rng_state(generator_state)
    path = Path(path)
    _cast_all_but_expert_biases(model, dtype)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    character_tokenizer().save_pretrained(path)
    return path


def _expert_biases(model: torch.nn.Module) -> list[tuple[torch.nn.Module, torch.Tensor]]:
    """Return each router that has an expert bias, with the bias."""
    return [
        (module, getattr(module, _EXPERT_BIAS))
        for module in model.modules()
        if isinstance(getattr(module, _EXPERT_BIAS, None), torch.Tensor)
    ]


def _cast_all_but_expert_biases(model: torch.nn.Module, dtype: torch.dtype) -> None:
    biases = [(router, bias.data) for router, bias in _expert_biases(model)]
    model.to(dtype)
    for router, bias in biases:
        getattr(router, _EXPERT_BIAS).data = bias


def character_tokenizer() -> Any:
    """Build a tokenizer with one token a character; lossless on printable ASCII and newlines.

    Examples:
        >>> tokenizer = character_tokenizer()
        >>> tokenizer.decode(tokenizer.encode("2 + 2 = 4"))
        '2 + 2 = 4'
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(SPECIAL_TOKENS + CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
