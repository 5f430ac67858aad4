"""Which Megatron parameter holds which Hugging Face tensors: one table for each model family.

A family is a list of `Rule`s and a function of `shapes` that reads its Hugging Face config. Adding
a family means adding both; `weights.py` knows no architecture.

In: a Hugging Face model type. Out: a `Family`.
"""

from __future__ import annotations

from collections.abc import Mapping

from moe_replay.errors import UnsupportedError
from moe_replay.megatron.families import shapes as family_shapes
from moe_replay.megatron.families.family import Family, Kind, Rule

_LAYER = "decoder.layers.{layer}."
_HF = "model.layers.{layer}."


def _mlp(megatron: str, hf: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    return (
        Rule(
            megatron=f"{megatron}.linear_fc1.weight",
            hf=(f"{hf}.{gate}.weight", f"{hf}.{up}.weight"),
            kind=Kind.GATED,
        ),
        Rule(megatron=f"{megatron}.linear_fc2.weight", hf=(f"{hf}.{down}.weight",), kind=Kind.ROW),
    )


def _experts(hf: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    gate_up = (f"{hf}.{{expert}}.{gate}.weight", f"{hf}.{{expert}}.{up}.weight")
    transformer_engine = f"{_LAYER}mlp.experts"
    return (
        *_mlp(f"{_LAYER}mlp.experts.local_experts.{{expert}}", f"{hf}.{{expert}}", gate, up, down),
        Rule(
            megatron=f"{transformer_engine}.linear_fc1.weight{{expert}}",
            hf=gate_up,
            kind=Kind.GATED,
        ),
        Rule(
            megatron=f"{transformer_engine}.linear_fc2.weight{{expert}}",
            hf=(f"{hf}.{{expert}}.{down}.weight",),
            kind=Kind.ROW,
        ),
    )


_QKV_NAMES = tuple(f"{_HF}self_attn.{name}_proj" for name in "qkv")
_HEAD = (
    Rule(
        megatron="embedding.word_embeddings.weight",
        hf=("model.embed_tokens.weight",),
        kind=Kind.COLUMN,
    ),
)
_TAIL = (
    Rule(megatron="decoder.final_layernorm.weight", hf=("model.norm.weight",)),
    Rule(megatron="output_layer.weight", hf=("lm_head.weight",), kind=Kind.COLUMN),
)
# Transformer Engine fuses a norm into the linear layer that follows it.
_NORMS = (
    Rule(megatron=f"{_LAYER}input_layernorm.weight", hf=(f"{_HF}input_layernorm.weight",)),
    Rule(
        megatron=f"{_LAYER}self_attention.linear_qkv.layer_norm_weight",
        hf=(f"{_HF}input_layernorm.weight",),
    ),
    Rule(
        megatron=f"{_LAYER}pre_mlp_layernorm.weight", hf=(f"{_HF}post_attention_layernorm.weight",)
    ),
    Rule(
        megatron=f"{_LAYER}mlp.linear_fc1.layer_norm_weight",
        hf=(f"{_HF}post_attention_layernorm.weight",),
    ),
)
_QKV = (
    Rule(
        megatron=f"{_LAYER}self_attention.linear_qkv.weight",
        hf=tuple(f"{name}.weight" for name in _QKV_NAMES),
        kind=Kind.QKV,
    ),
)
_QKV_BIAS = (
    Rule(
        megatron=f"{_LAYER}self_attention.linear_qkv.bias",
        hf=tuple(f"{name}.bias" for name in _QKV_NAMES),
        kind=Kind.QKV,
    ),
)
_OUT = (
    Rule(
        megatron=f"{_LAYER}self_attention.linear_proj.weight",
        hf=(f"{_HF}self_attn.o_proj.weight",),
        kind=Kind.ROW,
    ),
)
_QK_NORM = (
    Rule(
        megatron=f"{_LAYER}self_attention.q_layernorm.weight", hf=(f"{_HF}self_attn.q_norm.weight",)
    ),
    Rule(
        megatron=f"{_LAYER}self_attention.k_layernorm.weight", hf=(f"{_HF}self_attn.k_norm.weight",)
    ),
)
_ROUTER = (Rule(megatron=f"{_LAYER}mlp.router.weight", hf=(f"{_HF}mlp.gate.weight",)),)
_DENSE_MLP = _mlp(f"{_LAYER}mlp", f"{_HF}mlp", "gate_proj", "up_proj", "down_proj")
_EXPERTS = _experts(f"{_HF}mlp.experts", "gate_proj", "up_proj", "down_proj")
_SHARED_EXPERT = (
    *_mlp(
        f"{_LAYER}mlp.shared_experts",
        f"{_HF}mlp.shared_expert",
        "gate_proj",
        "up_proj",
        "down_proj",
    ),
    Rule(
        megatron=f"{_LAYER}mlp.shared_experts.gate_weight",
        hf=(f"{_HF}mlp.shared_expert_gate.weight",),
    ),
)
_SHARED_EXPERTS = _mlp(
    f"{_LAYER}mlp.shared_experts", f"{_HF}mlp.shared_experts", "gate_proj", "up_proj", "down_proj"
)
_EXPERT_BIAS = (
    Rule(
        megatron=f"{_LAYER}mlp.router.expert_bias",
        hf=(f"{_HF}mlp.gate.e_score_correction_bias",),
        keep_dtype=True,
    ),
)
_MIXTRAL_MOE = (
    Rule(megatron=f"{_LAYER}mlp.router.weight", hf=(f"{_HF}block_sparse_moe.gate.weight",)),
    *_experts(f"{_HF}block_sparse_moe.experts", "w1", "w3", "w2"),
)


def _projection(megatron: str, hf: str, kind: Kind = Kind.COLUMN) -> Rule:
    return Rule(
        megatron=f"{_LAYER}self_attention.{megatron}.weight",
        hf=(f"{_HF}self_attn.{hf}.weight",),
        kind=kind,
    )


# Multi-head latent attention. As everywhere, Transformer Engine names a norm after the linear layer
# behind it.
_MLA = (
    _projection("linear_q_proj", "q_proj"),
    _projection("linear_q_down_proj", "q_a_proj", Kind.WHOLE),
    *(
        Rule(
            megatron=f"{_LAYER}self_attention.{name}", hf=(f"{_HF}self_attn.q_a_layernorm.weight",)
        )
        for name in ("q_layernorm.weight", "linear_q_up_proj.layer_norm_weight")
    ),
    _projection("linear_q_up_proj", "q_b_proj"),
    _projection("linear_kv_down_proj", "kv_a_proj_with_mqa", Kind.WHOLE),
    *(
        Rule(
            megatron=f"{_LAYER}self_attention.{name}", hf=(f"{_HF}self_attn.kv_a_layernorm.weight",)
        )
        for name in ("kv_layernorm.weight", "linear_kv_up_proj.layer_norm_weight")
    ),
    _projection("linear_kv_up_proj", "kv_b_proj"),
)


def _table(*parts: tuple[Rule, ...]) -> tuple[Rule, ...]:
    return tuple(rule for part in (_HEAD, _NORMS, *parts, _TAIL) for rule in part)


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
        rules=_table(_QKV, _QK_NORM, _OUT, _ROUTER, _EXPERTS),
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
}


def family_of(model_type: str) -> Family:
    """Return the family of a Hugging Face `model_type`.

    Raises:
        UnsupportedError: there is no table for it.
    """
    if model_type not in FAMILIES:
        raise UnsupportedError(
            f"no weight table for model_type {model_type!r}; known: {', '.join(FAMILIES)}. "
            "A new family is one table in moe_replay/megatron/families/rules.py."
        )
    return FAMILIES[model_type]
