"""Which Megatron parameter holds which Hugging Face tensors: one table for each model family.

A family is a list of `Rule`s and a function from its Hugging Face config to a `ModelShape`. Adding a family means
adding a table here; `weights.py` knows no architecture.

In: a Hugging Face config. Out: a `Family` and a `ModelShape`.
Called by: `moe_replay.megatron.model`, `moe_replay.megatron.weights`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_replay.errors import UnsupportedError


class Kind(enum.Enum):
    """How the Hugging Face tensors lie in the Megatron parameter, and where tensor parallelism cuts it."""

    WHOLE = "one tensor, the same on every tensor-parallel rank"
    COLUMN = "one tensor, cut along dim 0"
    ROW = "one tensor, cut along dim 1"
    QKV = "query, key, value interleaved by query group, cut between groups"
    GATED = "gate above up projection, each cut along its dim 0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One line of a family's table."""

    megatron: str
    """Parameter name inside a model chunk; `{layer}` and `{expert}` stand for this rank's local numbers."""
    hf: tuple[str, ...]
    """Checkpoint names of the tensors in it; `{layer}` and `{expert}` stand for global numbers."""
    kind: Kind = Kind.WHOLE
    """How they lie in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What a Hugging Face config says about the model, in one vocabulary for all families."""

    family: str
    """The `model_type` of the Hugging Face config."""
    num_layers: int
    """Decoder layers, dense ones included."""
    hidden_size: int
    """Width of the residual stream."""
    num_attention_heads: int
    """Query heads."""
    num_query_groups: int
    """Key and value heads."""
    head_dim: int
    """Width of one head."""
    vocab_size: int
    """Rows of the embedding."""
    max_position_embeddings: int
    """Longest sequence, in tokens."""
    rotary_base: float
    """Base of the rotary frequencies."""
    tie_word_embeddings: bool
    """The output layer is the embedding."""
    ffn_size: int
    """Inner width of a dense layer's MLP."""
    num_experts: int
    """Experts of one MoE layer; 0 for a dense model."""
    topk: int
    """Experts that a token goes through."""
    expert_ffn_size: int
    """Inner width of one expert."""
    moe_layers: tuple[int, ...]
    """Global decoder indices of the layers that the config says are MoE layers."""
    megatron_fields: Mapping[str, Any] = field(default_factory=dict)
    """TransformerConfig fields that only this family sets."""

    @property
    def num_moe_layers(self) -> int:
        """Number of MoE layers; with 0 there is nothing to replay."""
        return len(self.moe_layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Everything that is known about one architecture."""

    rules: tuple[Rule, ...]
    """In the order in which tensors are exported."""
    shape: Callable[[Any], ModelShape]
    """Reads the Hugging Face config; raises UnsupportedError for what Megatron cannot do exactly."""
    all_heads_qk_norm: bool = False
    """The query and key norms span all heads."""


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


_QKV = tuple(f"{_HF}self_attn.{name}_proj" for name in "qkv")
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
_ATTENTION = (
    Rule(
        megatron=f"{_LAYER}self_attention.linear_qkv.weight",
        hf=tuple(f"{name}.weight" for name in _QKV),
        kind=Kind.QKV,
    ),
    Rule(
        megatron=f"{_LAYER}self_attention.linear_proj.weight",
        hf=(f"{_HF}self_attn.o_proj.weight",),
        kind=Kind.ROW,
    ),
)
_QKV_BIAS = (
    Rule(
        megatron=f"{_LAYER}self_attention.linear_qkv.bias",
        hf=tuple(f"{name}.bias" for name in _QKV),
        kind=Kind.QKV,
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
_MIXTRAL_MOE = (
    Rule(megatron=f"{_LAYER}mlp.router.weight", hf=(f"{_HF}block_sparse_moe.gate.weight",)),
    *_experts(f"{_HF}block_sparse_moe.experts", "w1", "w3", "w2"),
)


def _refuse(hf: Any, **accepted: tuple[Any, ...]) -> None:
    for name, values in accepted.items():
        got = getattr(hf, name, None)
        if got is not None and got not in values:
            raise UnsupportedError(
                f"{hf.model_type} config has {name} = {got!r}; supported: "
                f"{' or '.join(map(repr, values)) or 'leaving it unset'}"
            )


def _common(hf: Any, **fields: Any) -> ModelShape:
    _refuse(hf, hidden_act=("silu",), attention_dropout=(0.0, 0), clip_qkv=())
    rope = hf.rope_parameters
    if (
        rope.get("rope_type", "default") != "default"
        or rope.get("partial_rotary_factor", 1.0) != 1.0
    ):
        raise UnsupportedError(
            f"{hf.model_type} config has rope_parameters {dict(rope)}; supported: rope_type 'default' over the "
            "whole head"
        )
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    shape: dict[str, Any] = {
        "family": hf.model_type,
        "num_layers": hf.num_hidden_layers,
        "hidden_size": hf.hidden_size,
        "num_attention_heads": hf.num_attention_heads,
        "num_query_groups": hf.num_key_value_heads,
        "head_dim": head_dim,
        "vocab_size": hf.vocab_size,
        "max_position_embeddings": hf.max_position_embeddings,
        "rotary_base": rope["rope_theta"],
        "tie_word_embeddings": bool(hf.tie_word_embeddings),
        "ffn_size": hf.intermediate_size,
        "moe_layers": tuple(range(hf.num_hidden_layers)),
    }
    fields["megatron_fields"] = {
        "layernorm_epsilon": hf.rms_norm_eps,
        **fields.get("megatron_fields", {}),
    }
    return ModelShape(**(shape | fields))


def _qwen(hf: Any, **megatron_fields: Any) -> ModelShape:
    _refuse(hf, use_sliding_window=(False,))
    moe_layers = tuple(
        layer
        for layer in range(hf.num_hidden_layers)
        if layer not in hf.mlp_only_layers and (layer + 1) % hf.decoder_sparse_step == 0
    )
    megatron_fields["moe_router_pre_softmax"] = not hf.norm_topk_prob
    return _common(
        hf,
        num_experts=hf.num_experts,
        topk=hf.num_experts_per_tok,
        expert_ffn_size=hf.moe_intermediate_size,
        moe_layers=moe_layers,
        megatron_fields=megatron_fields,
    )


def _qwen3_moe(hf: Any) -> ModelShape:
    _refuse(hf, attention_bias=(False,))
    return _qwen(hf, qk_layernorm=True)


def _qwen2_moe(hf: Any) -> ModelShape:
    return _qwen(
        hf,
        add_qkv_bias=bool(hf.qkv_bias),
        moe_shared_expert_intermediate_size=hf.shared_expert_intermediate_size,
        moe_shared_expert_gate=True,
    )


def _mixtral(hf: Any) -> ModelShape:
    _refuse(hf, sliding_window=(), router_jitter_noise=(0.0, 0))
    return _common(
        hf,
        num_experts=hf.num_local_experts,
        topk=hf.num_experts_per_tok,
        expert_ffn_size=hf.intermediate_size,
    )


def _olmoe(hf: Any) -> ModelShape:
    _refuse(hf, attention_bias=(False,))
    return _common(
        hf,
        num_experts=hf.num_experts,
        topk=hf.num_experts_per_tok,
        expert_ffn_size=hf.intermediate_size,
        megatron_fields={"qk_layernorm": True, "moe_router_pre_softmax": not hf.norm_topk_prob},
    )


def _table(*parts: tuple[Rule, ...]) -> tuple[Rule, ...]:
    return tuple(rule for part in (_HEAD, _NORMS, _ATTENTION, *parts, _TAIL) for rule in part)


FAMILIES: Mapping[str, Family] = {
    "qwen3_moe": Family(rules=_table(_QK_NORM, _ROUTER, _EXPERTS, _DENSE_MLP), shape=_qwen3_moe),
    "qwen2_moe": Family(
        rules=_table(_QKV_BIAS, _ROUTER, _EXPERTS, _SHARED_EXPERT, _DENSE_MLP), shape=_qwen2_moe
    ),
    "mixtral": Family(rules=_table(_MIXTRAL_MOE), shape=_mixtral),
    "olmoe": Family(
        rules=_table(_QK_NORM, _ROUTER, _EXPERTS), shape=_olmoe, all_heads_qk_norm=True
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
            "A new family is one table in moe_replay/megatron/families.py."
        )
    return FAMILIES[model_type]
