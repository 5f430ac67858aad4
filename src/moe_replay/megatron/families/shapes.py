"""What the Hugging Face config of each family means, and which options Megatron cannot match."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moe_replay.errors import UnsupportedError
from moe_replay.megatron.families.family import ModelShape
from moe_replay.megatron.replay.expert_groups import ExpertGroups

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_ROPE_KEYS = frozenset(
    {
        "rope_type",
        "type",
        "rope_theta",
        "partial_rotary_factor",
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    }
)


def _refuse(hf: PretrainedConfig, **accepted: tuple[Any, ...]) -> None:
    for name, values in accepted.items():
        got = getattr(hf, name, None)
        if got is not None and got not in values:
            raise UnsupportedError(
                f"{hf.model_type} config has {name} = {got!r}; supported: "
                f"{' or '.join(map(repr, values)) or 'leaving it unset'}"
            )


def _common(
    hf: PretrainedConfig, *, rope_types: tuple[str, ...] = ("default",), **fields: Any
) -> ModelShape:
    _refuse(hf, hidden_act=("silu",), attention_dropout=(0.0, 0), clip_qkv=())
    if any(kind != "full_attention" for kind in getattr(hf, "layer_types", None) or ()):
        raise UnsupportedError(
            f"{hf.model_type} config has layer_types {sorted(set(hf.layer_types))}; supported: 'full_attention' in all layers"
        )
    rope = hf.rope_parameters
    if unknown := sorted(k for k, v in rope.items() if v is not None and k not in _ROPE_KEYS):
        raise UnsupportedError(
            f"{hf.model_type} config has {', '.join(unknown)} in rope_parameters, which would change the positions; "
            f"supported: {', '.join(sorted(_ROPE_KEYS))}"
        )
    if rope.get("rope_type", "default") not in rope_types or not rope.get("truncate", True):
        raise UnsupportedError(
            f"{hf.model_type} config has rope_parameters {dict(rope)}; supported: rope_type "
            f"{' or '.join(map(repr, rope_types))}"
        )
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    rotary_frac = rope.get("partial_rotary_factor", 1.0)
    latent = fields.get("megatron_fields", {}).get("multi_latent_attention", False)
    is_scaled = rope.get("rope_type", "default") == "yarn" and not latent
    if is_scaled and rotary_frac != 1.0:
        raise UnsupportedError(
            f"{hf.model_type} config has YaRN with partial_rotary_factor = {rotary_frac}; supported: YaRN over complete heads"
        )
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
        "rotary_frac": rotary_frac,
        "yarn": _yarn(hf) if is_scaled else {},
        "tie_word_embeddings": bool(hf.tie_word_embeddings),
        "ffn_size": hf.intermediate_size,
        "moe_layers": tuple(range(hf.num_hidden_layers)),
    }
    fields["megatron_fields"] = {
        "layernorm_epsilon": hf.rms_norm_eps,
        **fields.get("megatron_fields", {}),
    }
    return ModelShape(**(shape | fields))


def _yarn(hf: PretrainedConfig) -> dict[str, Any]:
    """Return the YaRN scaling of grouped-query attention, with transformers' defaults."""
    rope = hf.rope_parameters
    original = rope.get("original_max_position_embeddings") or hf.max_position_embeddings
    both = bool(rope.get("mscale") and rope.get("mscale_all_dim"))
    return {
        "rotary_scaling_factor": float(rope.get("factor") or hf.max_position_embeddings / original),
        "original_max_position_embeddings": original,
        "beta_fast": float(rope.get("beta_fast") or 32),
        "beta_slow": float(rope.get("beta_slow") or 1),
        # Without both of them attention is scaled by 0.1 ln(factor) + 1.
        "mscale": rope["mscale"] if both else None,
        "mscale_all_dim": rope["mscale_all_dim"] if both else None,
        "correction_range_round_to_int": True,
    }


def _qwen(hf: PretrainedConfig, **megatron_fields: Any) -> ModelShape:
    _refuse(hf, use_sliding_window=(False,))
    moe_layers = tuple(
        layer
        for layer in range(hf.num_hidden_layers)
        if layer not in hf.mlp_only_layers and (layer + 1) % hf.decoder_sparse_step == 0
    )
    megatron_fields["moe_router_pre_softmax"] = not hf.norm_topk_prob
    return _common(
        hf,
        rope_types=("default", "yarn"),
        num_experts=hf.num_experts,
        topk=hf.num_experts_per_tok,
        expert_ffn_size=hf.moe_intermediate_size,
        moe_layers=moe_layers,
        megatron_fields=megatron_fields,
    )


def qwen3_moe(hf: PretrainedConfig) -> ModelShape:
    """Read a Qwen3-MoE config: grouped-query attention with query and key norms."""
    _refuse(hf, attention_bias=(False,))
    return _qwen(hf, qk_layernorm=True)


def qwen2_moe(hf: PretrainedConfig) -> ModelShape:
    """Read a Qwen2-MoE config: query, key and value biases, a gated shared expert."""
    return _qwen(
        hf,
        add_qkv_bias=bool(hf.qkv_bias),
        moe_shared_expert_intermediate_size=hf.shared_expert_intermediate_size,
        moe_shared_expert_gate=True,
    )


def mixtral(hf: PretrainedConfig) -> ModelShape:
    """Read a Mixtral config."""
    _refuse(hf, sliding_window=(), router_jitter_noise=(0.0, 0))
    return _common(
        hf,
        num_experts=hf.num_local_experts,
        topk=hf.num_experts_per_tok,
        expert_ffn_size=hf.intermediate_size,
    )


def olmoe(hf: PretrainedConfig) -> ModelShape:
    """Read an OLMoE config: query and key norms over all heads."""
    _refuse(hf, attention_bias=(False,))
    return _common(
        hf,
        num_experts=hf.num_experts,
        topk=hf.num_experts_per_tok,
        expert_ffn_size=hf.intermediate_size,
        megatron_fields={"qk_layernorm": True, "moe_router_pre_softmax": not hf.norm_topk_prob},
    )


def _dense_first(hf: PretrainedConfig, *, sigmoid: bool) -> dict[str, Any]:
    """Return what families with leading dense layers and shared experts have in common."""
    groups = _groups(hf, num_scored=2 if sigmoid else 1)
    _refuse(hf, moe_layer_freq=(1,), scoring_func=("sigmoid" if sigmoid else "softmax",))
    megatron_fields = {
        "moe_router_topk_scaling_factor": hf.routed_scaling_factor,
        "moe_shared_expert_intermediate_size": hf.n_shared_experts * hf.moe_intermediate_size,
    }
    # Megatron scores a group by the sum of its best topk // group_topk experts; the models by a
    # fixed number.
    as_megatron = (
        groups is not None
        and hf.num_experts_per_tok // groups.groups_per_token == groups.num_scored
    )
    if groups is not None and as_megatron:
        megatron_fields |= {
            "moe_router_num_groups": groups.num_groups,
            "moe_router_group_topk": groups.groups_per_token,
        }
    if sigmoid:
        _refuse(hf, norm_topk_prob=(True,))
        megatron_fields |= {
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            # The bias is a weight of the policy here: as loaded, and the same in trainer and
            # engine.
            "moe_router_bias_update_rate": 0.0,
        }
    return {
        "num_experts": hf.n_routed_experts,
        "topk": hf.num_experts_per_tok,
        "expert_ffn_size": hf.moe_intermediate_size,
        "moe_layers": tuple(range(hf.first_k_dense_replace, hf.num_hidden_layers)),
        "num_mtp_layers": getattr(hf, "num_nextn_predict_layers", None) or 0,
        "expert_groups": None if as_megatron else groups,
        "megatron_fields": megatron_fields,
    }


def _groups(hf: PretrainedConfig, *, num_scored: int) -> ExpertGroups | None:
    """Return the groups that limit the experts of a token, or None where there is one group."""
    num_groups, chosen, topk = hf.n_group or 1, hf.topk_group or 1, hf.num_experts_per_tok
    if num_groups == 1:
        return None
    size, left = divmod(hf.n_routed_experts, num_groups)
    if left or chosen > num_groups or topk > chosen * size or size < num_scored:
        raise UnsupportedError(
            f"{hf.model_type} config has {hf.n_routed_experts} experts in n_group = {num_groups}, topk_group = {chosen} and "
            f"num_experts_per_tok = {topk}; expected equal groups, of which the chosen ones hold {topk} experts"
        )
    return ExpertGroups(num_groups=num_groups, groups_per_token=chosen, num_scored=num_scored)


def _latent_attention(hf: PretrainedConfig) -> dict[str, Any]:
    _refuse(
        hf,
        attention_bias=(False,),
        rope_interleave=(True,),
        num_key_value_heads=(hf.num_attention_heads,),
    )
    fields = {
        "multi_latent_attention": True,
        # Megatron's name for the norms between the two halves of each projection.
        "qk_layernorm": True,
        "q_lora_rank": hf.q_lora_rank,
        "kv_lora_rank": hf.kv_lora_rank,
        "qk_head_dim": hf.qk_nope_head_dim,
        "qk_pos_emb_head_dim": hf.qk_rope_head_dim,
        "v_head_dim": hf.v_head_dim,
        "rotary_base": hf.rope_parameters["rope_theta"],
        "rope_type": "rope",
    }
    rope = hf.rope_parameters
    if rope.get("rope_type", "default") == "yarn":
        fields |= {
            "rope_type": "yarn",
            "rotary_scaling_factor": rope["factor"],
            "original_max_position_embeddings": rope.get("original_max_position_embeddings")
            or hf.max_position_embeddings,
            "beta_fast": rope.get("beta_fast") or 32,
            "beta_slow": rope.get("beta_slow") or 1,
            "mscale": rope.get("mscale") or 1.0,
            "mscale_all_dim": rope.get("mscale_all_dim") or 0.0,
        }
    return fields


def _deepseek(hf: PretrainedConfig, *, sigmoid: bool) -> ModelShape:
    fields = _dense_first(hf, sigmoid=sigmoid)
    fields["megatron_fields"] |= _latent_attention(hf)
    return _common(hf, rope_types=("default", "yarn"), **fields)


def deepseek_v2(hf: PretrainedConfig) -> ModelShape:
    """Read a DeepSeek-V2 config: latent attention, softmax router, dense and shared experts."""
    _refuse(hf, norm_topk_prob=(False,), mlp_bias=(False,))
    _refuse(hf, topk_method=("greedy", "group_limited_greedy"))
    if hf.topk_method == "greedy":
        # Some libraries go by the method, others by the number.
        _refuse(hf, n_group=(1,))
    shape = _deepseek(hf, sigmoid=False)
    return replace(shape, megatron_fields={**shape.megatron_fields, "moe_router_pre_softmax": True})


def deepseek_v3(hf: PretrainedConfig) -> ModelShape:
    """Read a DeepSeek-V3 config: as V2, with a sigmoid router, expert bias and groups."""
    _refuse(hf, topk_method=("noaux_tc",))
    return _deepseek(hf, sigmoid=True)


def glm4_moe(hf: PretrainedConfig) -> ModelShape:
    """Read a GLM-4-MoE config: grouped-query attention, the router of DeepSeek-V3."""
    fields = _dense_first(hf, sigmoid=True)
    fields["megatron_fields"] |= {
        "qk_layernorm": hf.use_qk_norm,
        "add_qkv_bias": hf.attention_bias,
    }
    return _common(hf, **fields)
