"""Families of transformers that this trainer refuses, each with what Megatron-Core lacks.

"Megatron-Core" is the release that was tried, 0.16.1. `moe_replay.transformers` records and replays
most of these families in transformers itself.
"""

from __future__ import annotations

from collections.abc import Mapping

_DELTA = (
    "some layers are linear attention (gated delta rule): Megatron-Core has that layer for Qwen3-Next alone, needs "
    "flash-linear-attention on a GPU for it, and raises for packed sequences, which all batches are here"
)
_LINEAR = "some layers are linear attention of a kind that Megatron-Core does not have"
_STATE = "some layers are Mamba layers, which Megatron-Core's GPTModel does not have"
_CONVOLUTION = "some layers are short convolutions, which Megatron-Core does not have"
_SPARSE = (
    "its attention looks at the keys that an indexer picks: Megatron-Core has an experimental layer for DeepSeek-V3.2 "
    "that takes no packed sequences, which all batches are here"
)
_MULTIPLIERS = (
    "residual connections, embeddings and logits have multipliers, which Megatron-Core does not have; folded into the "
    "weights they would be trained, and exported, as other weights"
)
_NORMS_AFTER = (
    "norms follow attention and experts; Megatron-Core's layers norm what enters them alone"
)
_VISION = (
    "its language model lies beside parts for other inputs, in one checkpoint: the trainer builds, saves and pushes pure "
    "language models"
)
_UNCOMPARED = "its layers were not compared with those of Megatron-Core, and no table of its weights was written"

REFUSED: Mapping[str, str] = {
    "qwen3_next": _DELTA,
    "qwen3_5_moe": _DELTA,
    "qwen3_5_moe_text": _DELTA,
    "qwen4_exp": _DELTA,
    "kimi_linear": _LINEAR,
    "bailing_hybrid": _LINEAR,
    "minimax": _LINEAR,
    "jamba": _STATE,
    "nemotron_h": _STATE,
    "granitemoehybrid": _STATE,
    "lfm2_moe": _CONVOLUTION,
    "inkling": _CONVOLUTION,
    "inkling2": _CONVOLUTION,
    **dict.fromkeys(
        (
            *("deepseek_v32", "deepseek_v4", "glm_moe_dsa", "glm5_next", "hy_v4", "axk2"),
            *("dots3_note", "mistral_large4", "minimax_m3_vl", "minimax_m3_vl_text"),
        ),
        _SPARSE,
    ),
    "granitemoe": _MULTIPLIERS,
    "granitemoeshared": _MULTIPLIERS,
    "granitemoe_swa": _MULTIPLIERS,
    "afmoe": _NORMS_AFTER,
    "flex_olmo": _NORMS_AFTER,
    "beam": _NORMS_AFTER,
    "muse_spark": _NORMS_AFTER,
    "gemma4": _NORMS_AFTER,
    "gemma4_text": _NORMS_AFTER,
    "diffusion_gemma": _NORMS_AFTER,
    "llama4": (
        "router scores multiply what enters the experts, and layers without rotary positions scale queries by position; "
        "Megatron-Core has the first for one expert a token alone, and not the second"
    ),
    "mistral4": "queries are scaled by their position, which Megatron-Core does not do",
    "phimoe": (
        "its router masks experts by their distance to the best one (sparsemixer), and its norms have biases; "
        "Megatron-Core's router has no such choice"
    ),
    "dbrx": "queries, keys and values are clipped, which Megatron-Core does not do",
    "hunyuan_v1_moe": "query and key norms follow the rotation; Megatron-Core norms before it",
    "mimo_v2_flash": (
        "layers with a sliding window have sinks and twice the key and value heads of the others; Megatron-Core's layers "
        "are alike"
    ),
    "mellum": "rotary positions differ from layer to layer, which Megatron-Core does not have",
    "longcat_flash": (
        "a layer has two attentions and two MLPs beside its experts, some of which are the identity; Megatron-Core's "
        "layers have one of each"
    ),
    **dict.fromkeys(
        (
            *("qwen3_vl_moe", "qwen3_omni_moe", "qwen3_omni_moe_thinker", "ernie4_5_vl_moe"),
            *("glm4v_moe", "deepseek_ocr2", "unlimited_ocr", "aria", "step3p7"),
        ),
        _VISION,
    ),
    **dict.fromkeys(
        (
            *("axk1", "cohere2_moe", "exaone_moe", "flint", "hy_v3", "kolibri1", "laguna"),
            *("openai_privacy_filter", "solar_open", "zaya"),
        ),
        _UNCOMPARED,
    ),
}
"""`model_type` -> why."""
