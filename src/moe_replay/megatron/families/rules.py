"""Which Megatron parameter holds which Hugging Face tensors: one table for each model family.

A family is a list of `Rule`s and a function of `shapes` that reads its Hugging Face config. Adding
a family means adding both; `weights.py` knows no architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

from moe_replay.errors import UnsupportedError
from moe_replay.megatron.families import shapes as family_shapes
from moe_replay.megatron.families.family import Family, Kind, Rule
from moe_replay.megatron.families.refused import REFUSED
from moe_replay.megatron.replay.expert_groups import BIAS_NAME

_LAYER, _HF = "decoder.layers.{layer}.", "model.layers.{layer}."


def _rule(megatron: str, hf: str, kind: Kind = Kind.WHOLE) -> Rule:
    """Return a line of a decoder layer; ``hf`` names its tensors, with spaces between them."""
    names = tuple(_HF + name for name in hf.split())
    return Rule(megatron=_LAYER + megatron, hf=names, kind=kind)


def _attention(megatron: str, hf: str, kind: Kind = Kind.WHOLE) -> Rule:
    names = " ".join(f"self_attn.{name}" for name in hf.split())
    return _rule(f"self_attention.{megatron}", names, kind)


def _mlp(
    megatron: str, hf: str, names: str = "gate_proj up_proj down_proj", number: str = ""
) -> tuple[Rule, ...]:
    gate, up, down = (f"{hf}.{name}.weight" for name in names.split())
    return (
        _rule(f"{megatron}.linear_fc1.weight{number}", f"{gate} {up}", Kind.GATED),
        _rule(f"{megatron}.linear_fc2.weight{number}", down, Kind.ROW),
    )


def _experts(hf: str, names: str = "gate_proj up_proj down_proj") -> tuple[Rule, ...]:
    """Return the lines of Megatron's own experts, and of Transformer Engine's single module."""
    return (
        *_mlp("mlp.experts.local_experts.{expert}", f"{hf}.{{expert}}", names),
        *_mlp("mlp.experts", f"{hf}.{{expert}}", names, number="{expert}"),
    )


def _expert_biases(hf: str) -> tuple[Rule, ...]:
    gate, up, down = (f"{hf}.{{expert}}.{name}_proj.bias" for name in ("gate", "up", "down"))
    lines = []
    for module, number in (("mlp.experts.local_experts.{expert}", ""), ("mlp.experts", "{expert}")):
        lines += [
            _rule(f"{module}.linear_fc1.bias{number}", f"{gate} {up}", Kind.GATED),
            _rule(f"{module}.linear_fc2.bias{number}", down),
        ]
    return tuple(lines)


_EMBEDDING = Rule(
    megatron="embedding.word_embeddings.weight",
    hf=("model.embed_tokens.weight",),
    kind=Kind.VOCABULARY,
)
_TAIL = (
    Rule(megatron="decoder.final_layernorm.weight", hf=("model.norm.weight",)),
    Rule(megatron="output_layer.weight", hf=("lm_head.weight",), kind=Kind.VOCABULARY),
)
# Transformer Engine fuses a norm into the linear layer that follows it.
_NORMS = (
    _rule("input_layernorm.weight", "input_layernorm.weight"),
    _rule("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    _rule("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
    _rule("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight"),
)
_QKV = (_attention("linear_qkv.weight", "q_proj.weight k_proj.weight v_proj.weight", Kind.QKV),)
_QKV_BIAS = (_attention("linear_qkv.bias", "q_proj.bias k_proj.bias v_proj.bias", Kind.QKV),)
_OUT = (_attention("linear_proj.weight", "o_proj.weight", Kind.ROW),)
_QK_NORM = (
    _attention("q_layernorm.weight", "q_norm.weight"),
    _attention("k_layernorm.weight", "k_norm.weight"),
)
_QK_NORM_OF_ALL_HEADS = (
    _attention("query_norm.weight", "q_norm.weight", Kind.COLUMN),
    _attention("key_norm.weight", "k_norm.weight", Kind.COLUMN),
)
_ROUTER = (_rule("mlp.router.weight", "mlp.gate.weight"),)
_DENSE_MLP = _mlp("mlp", "mlp")
_EXPERTS = _experts("mlp.experts")
_SHARED_EXPERT = (
    *_mlp("mlp.shared_experts", "mlp.shared_expert"),
    _rule("mlp.shared_experts.gate_weight", "mlp.shared_expert_gate.weight"),
)
_SHARED_EXPERTS = _mlp("mlp.shared_experts", "mlp.shared_experts")
_EXPERT_BIAS = (_rule("mlp.router.expert_bias", "mlp.gate.e_score_correction_bias"),)
_SOFTMAX_BIAS = (
    _rule(f"mlp.router.{BIAS_NAME}", "mlp.moe_statics.e_score_correction_bias", Kind.SINGLE_ROW),
)
_MIXTRAL_MOE = (
    _rule("mlp.router.weight", "block_sparse_moe.gate.weight"),
    *_experts("block_sparse_moe.experts", "w1 w3 w2"),
)
_ROUTER_BIAS = (
    _rule("mlp.router.weight", "mlp.router.weight"),
    _rule("mlp.router.bias", "mlp.router.bias"),
)
_OUT_BIAS = (_attention("linear_proj.bias", "o_proj.bias"),)
_SINKS = (_attention("core_attention.softmax_offset", "sinks", Kind.COLUMN),)
_MIXTRAL_BIAS = (_rule("mlp.router.expert_bias", "block_sparse_moe.e_score_correction_bias"),)
# Multi-head latent attention. As everywhere, Transformer Engine names a norm after the linear layer
# behind it.
_MLA = (
    _attention("linear_q_proj.weight", "q_proj.weight", Kind.COLUMN),
    _attention("linear_q_down_proj.weight", "q_a_proj.weight"),
    _attention("q_layernorm.weight", "q_a_layernorm.weight"),
    _attention("linear_q_up_proj.layer_norm_weight", "q_a_layernorm.weight"),
    _attention("linear_q_up_proj.weight", "q_b_proj.weight", Kind.COLUMN),
    _attention("linear_kv_down_proj.weight", "kv_a_proj_with_mqa.weight"),
    _attention("kv_layernorm.weight", "kv_a_layernorm.weight"),
    _attention("linear_kv_up_proj.layer_norm_weight", "kv_a_layernorm.weight"),
    _attention("linear_kv_up_proj.weight", "kv_b_proj.weight", Kind.COLUMN),
)


def _table(*parts: tuple[Rule, ...]) -> tuple[Rule, ...]:
    return (_EMBEDDING, *_NORMS, *chain.from_iterable(parts), *_TAIL)


_SIGMOID_MOE = (*_ROUTER, *_EXPERT_BIAS, *_EXPERTS, *_SHARED_EXPERTS, *_DENSE_MLP)


FAMILIES: Mapping[str, Family] = {
    "qwen3_moe": Family(
        rules=_table(_QKV, _QK_NORM, _OUT, _ROUTER, _EXPERTS, _DENSE_MLP),
        shape=family_shapes.qwen3_moe,
    ),
    "qwen2_moe": Family(
        rules=_table(_QKV, _QKV_BIAS, _OUT, _ROUTER, _EXPERTS, _SHARED_EXPERT, _DENSE_MLP),
        shape=family_shapes.qwen2_moe,
    ),
    "mixtral": Family(rules=_table(_QKV, _OUT, _MIXTRAL_MOE), shape=family_shapes.mixtral),
    "olmoe": Family(
        rules=_table(_QKV, _QK_NORM_OF_ALL_HEADS, _OUT, _ROUTER, _EXPERTS),
        shape=family_shapes.olmoe,
        all_heads_qk_norm=True,
    ),
    "deepseek_v2": Family(
        rules=_table(_MLA, _OUT, _ROUTER, _EXPERTS, _SHARED_EXPERTS, _DENSE_MLP),
        shape=family_shapes.deepseek_v2,
    ),
    "deepseek_v3": Family(rules=_table(_MLA, _OUT, _SIGMOID_MOE), shape=family_shapes.deepseek_v3),
    "glm4_moe": Family(
        rules=_table(_QKV, _QKV_BIAS, _QK_NORM, _OUT, _SIGMOID_MOE), shape=family_shapes.glm4_moe
    ),
    "glm4_moe_lite": Family(
        rules=_table(_MLA, _OUT, _SIGMOID_MOE), shape=family_shapes.glm4_moe_lite
    ),
    "minimax_m2": Family(
        rules=_table(_QKV, _QK_NORM_OF_ALL_HEADS, _OUT, _MIXTRAL_MOE, _MIXTRAL_BIAS),
        shape=family_shapes.minimax_m2,
        all_heads_qk_norm=True,
    ),
    "ernie4_5_moe": Family(
        rules=_table(_QKV, _OUT, _ROUTER, _SOFTMAX_BIAS, _EXPERTS, _SHARED_EXPERTS, _DENSE_MLP),
        shape=family_shapes.ernie4_5_moe,
    ),
    "gpt_oss": Family(
        rules=_table(
            *(_QKV, _QKV_BIAS, _SINKS, _OUT, _OUT_BIAS, _ROUTER_BIAS),
            *(_EXPERTS, _expert_biases("mlp.experts")),
        ),
        shape=family_shapes.gpt_oss,
    ),
    "dots1": Family(rules=_table(_QKV, _QK_NORM, _OUT, _SIGMOID_MOE), shape=family_shapes.dots1),
}


def family_of(model_type: str) -> Family:
    """Return the family of a Hugging Face `model_type`.

    Raises:
        UnsupportedError: there is no table for it.
    """
    if model_type in REFUSED:
        raise UnsupportedError(
            f"{model_type} models cannot be trained: {REFUSED[model_type]}. Known: {', '.join(FAMILIES)}; in transformers "
            "itself, moe_replay.transformers records and replays most families"
        )
    if model_type not in FAMILIES:
        raise UnsupportedError(
            f"no weight table for model_type {model_type!r}; known: {', '.join(FAMILIES)}. "
            "A new family is one table in moe_replay/megatron/families/rules.py."
        )
    return FAMILIES[model_type]
