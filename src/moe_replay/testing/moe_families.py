"""A tiny random model of every MoE family that transformers ships, for proofs of replay.

In: the name of a family, as transformers names its folder. Out: a model of two MoE layers.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

import torch

_LAYERS = 2
# Field of a config -> its tiny value, for those configs that have the field.
_SIZES: dict[str, Any] = {
    # The model.
    "vocab_size": 64,
    "vocab_size_per_layer_input": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **dict.fromkeys(("num_hidden_layers", "n_layers", "num_layers"), _LAYERS),
    **dict.fromkeys(("num_nextn_predict_layers", "num_mtp_layers"), 0),
    **dict.fromkeys(("hidden_size", "d_model"), 32),
    "hidden_size_per_layer_input": 0,
    # Attention, linear attention and state-space layers.
    **dict.fromkeys(("num_attention_heads", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("linear_num_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "index_n_heads"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "linear_head_dim", "swa_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "kv_channels"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_head_dim"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("index_topk", "sliding_window"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "index_head_dim"), 16),
    "layer_group_size": 2,
    # Feed-forward layers.
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "d_ff"), 32),
    **dict.fromkeys(("intermediate_size_mlp", "dense_intermediate_size"), 32),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "moe_hidden_size"), 16),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    "moe_shared_expert_intermediate_size": 16,
    "shared_experts_intermediate_size": 16,
    # Experts: 8, of which 2 are chosen; both layers are MoE.
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 8),
    "moe_num_experts": 8,
    "router_hidden_size": 16,
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts", "moe_k"), 2),
    **dict.fromkeys(("zero_expert_num", "n_group"), 2),
    "topk_group": 1,
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 0),
    "mlp_only_layers": (),
    "mlp_layer_types": ("sparse",) * _LAYERS,
    "expert_layer_period": 1,
    "expert_layer_offset": 0,
}
_ROPE = {
    "rope_type": "default",
    "rope_theta": 1e4,
    "mrope_section": [1, 1, 2],
    "partial_rotary_factor": 1.0,
}
# Families with a key-value head for each head.
_MHA = {"num_key_value_heads": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How to build a tiny model of one family, and which proofs it cannot take."""

    model: str
    """Class of transformers: the language model, or its text part."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Config fields beyond the common ones."""
    without: dict[str, str] = field(default_factory=dict)
    """Proof -> why the family itself cannot run it."""
    float32_router: bool = False
    """Whether transformers keeps its router in float32 whatever the model's dtype is."""


_GROUPED = {**_MHA, "topk_method": "group_limited_greedy"}
_PLAIN = {
    "afmoe": "AfmoeForCausalLM",
    "aria": "AriaTextForCausalLM",
    "beam": "BeamForCausalLM",
    "cohere2_moe": "Cohere2MoeForCausalLM",
    "dots1": "Dots1ForCausalLM",
    "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
    "exaone_moe": "ExaoneMoeForCausalLM",
    "flex_olmo": "FlexOlmoForCausalLM",
    "flint": "FlintForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM",
    "granitemoe_swa": "GraniteMoeSWAForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    "granitemoeshared": "GraniteMoeSharedForCausalLM",
    "hunyuan_v1_moe": "HunYuanMoEV1ForCausalLM",
    "hy_v3": "HYV3ForCausalLM",
    "hy_v4": "HYV4ForCausalLM",
    "inkling": "InklingForCausalLM",
    "jamba": "JambaForCausalLM",
    "kimi_linear": "KimiLinearForCausalLM",
    "kolibri1": "Kolibri1ForCausalLM",
    "laguna": "LagunaForCausalLM",
    "llama4": "Llama4ForCausalLM",
    "mellum": "MellumForCausalLM",
    "mimo_v2_flash": "MiMoV2FlashForCausalLM",
    "minimax": "MiniMaxForCausalLM",
    "minimax_m2": "MiniMaxM2ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "muse_spark": "MuseSparkTextModel",
    "olmoe": "OlmoeForCausalLM",
    "openai_privacy_filter": "OpenAIPrivacyFilterForTokenClassification",
    "phimoe": "PhimoeForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_5_moe": "Qwen3_5MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerTextModel",
    "qwen3_vl_moe": "Qwen3VLMoeTextModel",
    "solar_open": "SolarOpenForCausalLM",
    "step3p7": "Step3p7TextModel",
}
_WITH_HEADS = {
    "axk1": "AXK1ForCausalLM",
    "axk2": "AXK2ForCausalLM",
    "bailing_hybrid": "BailingHybridForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "dots3_note": "Dots3NoteForCausalLM",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
    "glm_moe_dsa": "GlmMoeDsaForCausalLM",
    "longcat_flash": "LongcatFlashForCausalLM",
    "mistral4": "Mistral4ForCausalLM",
    "mistral_large4": "MistralLarge4TextModel",
    "unlimited_ocr": "UnlimitedOcrTextModel",
}
_SPECIAL: dict[str, Family] = {
    "dbrx": Family(
        model="DbrxForCausalLM",
        fields={
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
            "ffn_config": {
                "hidden_size": 32,
                "ffn_hidden_size": 32,
                "moe_num_experts": 8,
                "moe_top_k": 2,
            },
        },
        without={"autocast": "its attention cannot run under autocast"},
    ),
    "deepseek_ocr2": Family(model="DeepseekOcr2TextModel", fields=_GROUPED),
    "deepseek_v2": Family(model="DeepseekV2ForCausalLM", fields=_GROUPED),
    # Its first layer takes experts by token: nothing is chosen there, and nothing replayed.
    "deepseek_v4": Family(
        model="DeepseekV4ForCausalLM",
        fields={"mlp_layer_types": ["hash_moe", "moe"]},
    ),
    "diffusion_gemma": Family(
        model="DiffusionGemmaEncoderTextModel",
        without={"checkpointing": "transformers has no checkpointing for it"},
    ),
    "ernie4_5_vl_moe": Family(
        model="Ernie4_5_VLMoeTextModel",
        fields={"moe_intermediate_size": [16, 16], "rope_parameters": _ROPE},
    ),
    "gemma4": Family(model="Gemma4ForCausalLM", fields={"enable_moe_block": True}),
    "glm4v_moe": Family(model="Glm4vMoeTextModel", fields={"rope_parameters": _ROPE}),
    "glm5_next": Family(
        model="Glm5NextTextModel", fields={**_MHA, "qk_rope_head_dim": 0, "index_kpool": 4}
    ),
    "inkling2": Family(model="Inkling2ForCausalLM", float32_router=True),
    "lfm2_moe": Family(
        model="Lfm2MoeForCausalLM", fields={"layer_types": ["conv", "full_attention"]}
    ),
    "minimax_m3_vl": Family(model="MiniMaxM3VLTextModel", fields={"rotary_dim": 8}),
    "nemotron_h": Family(
        model="NemotronHForCausalLM",
        fields={"layer_types": ["moe", "full_attention", "moe"], "num_hidden_layers": 3},
    ),
    "qwen4_exp": Family(
        model="Qwen4ExpForCausalLM",
        fields={
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
        },
    ),
    "zaya": Family(model="ZayaForCausalLM", fields={"num_experts_per_tok": 1}),
}

_ALL = {
    **{name: Family(model=model) for name, model in _PLAIN.items()},
    **{name: Family(model=model, fields=_MHA) for name, model in _WITH_HEADS.items()},
    **_SPECIAL,
}
MOE_FAMILIES: dict[str, Family] = dict(sorted(_ALL.items()))
"""Folder of transformers.models -> how to build a tiny model of its family."""


def tiny_family(name: str, *, seed: int = 0, **overrides: Any) -> Any:
    """Return a random float32 model of a family, in eval mode, with eager attention and experts.

    Its weights are larger than usual, and biases, scales and norms are not 0 or 1, so that wrong
    routes and forgotten terms show. The global random state is left as it was.

    Examples:
        >>> tiny_family("gpt_oss")(torch.tensor([[3, 4, 5]])).logits.shape
        torch.Size([1, 3, 64])
    """
    family = MOE_FAMILIES[name]
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    model_class = getattr(module, family.model)
    known = _fields_of(model_class.config_class)
    sizes = {key: value for key, value in _SIZES.items() if key in known}
    lists = {key: list(value) for key, value in sizes.items() if isinstance(value, tuple)}
    config = model_class.config_class(**{**sizes, **lists, **family.fields, **overrides})
    config._attn_implementation = config._experts_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).eval()
        with torch.no_grad():
            _randomise(model)
    return model


def _fields_of(config_class: type) -> set[str]:
    return {name for kind in config_class.__mro__ for name in getattr(kind, "__annotations__", {})}


def _randomise(model: torch.nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_floating_point() or "inv_freq" in name or not tensor.numel():
            continue
        if tensor.dim() < 2:
            is_added = not tensor.any() or "bias" in name or "scale" in name
            tensor.add_(torch.randn_like(tensor) * 0.05 if is_added else 0)
        elif "embed" not in name:
            tensor.mul_(5)
    from moe_replay.transformers import find_routers

    for site in find_routers(model):
        for parameter in site.module.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn_like(parameter) * 0.5)
