"""What the Hugging Face config of each family means, and which options Megatron cannot match."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron.core.fusions.fused_bias_geglu import quick_gelu

from moe_replay.errors import UnsupportedError
from moe_replay.megatron.families.common import common_shape, refuse_others
from moe_replay.megatron.families.family import ModelShape
from moe_replay.megatron.replay.expert_groups import ExpertGroups

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _qwen(hf: PretrainedConfig, **megatron_fields: Any) -> ModelShape:
    refuse_others(hf, use_sliding_window=(False,))
    moe_layers = tuple(
        layer
        for layer in range(hf.num_hidden_layers)
        if layer not in hf.mlp_only_layers and (layer + 1) % hf.decoder_sparse_step == 0
    )
    megatron_fields["moe_router_pre_softmax"] = not hf.norm_topk_prob
    return common_shape(
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
    refuse_others(hf, attention_bias=(False,))
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
    refuse_others(hf, sliding_window=(), router_jitter_noise=(0.0, 0))
    return common_shape(
        hf,
        num_experts=hf.num_local_experts,
        topk=hf.num_experts_per_tok,
        expert_ffn_size=hf.intermediate_size,
    )


def olmoe(hf: PretrainedConfig) -> ModelShape:
    """Read an OLMoE config: query and key norms over all heads."""
    refuse_others(hf, attention_bias=(False,))
    return common_shape(
        hf,
        num_experts=hf.num_experts,
        topk=hf.num_experts_per_tok,
        expert_ffn_size=hf.intermediate_size,
        megatron_fields={"qk_layernorm": True, "moe_router_pre_softmax": not hf.norm_topk_prob},
    )


# The bias is a weight of the policy here: as loaded, and the same in trainer and engine.
_SIGMOID = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.0,
}


def _dense_first(hf: PretrainedConfig, *, sigmoid: bool) -> dict[str, Any]:
    """Return what families with leading dense layers and shared experts have in common."""
    groups = _groups(hf, num_scored=2 if sigmoid else 1)
    # The released dots.llm1 has the name of the method there.
    functions = ("sigmoid", "noaux_tc") if sigmoid else ("softmax",)
    refuse_others(hf, moe_layer_freq=(1,), scoring_func=functions)
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
        refuse_others(hf, norm_topk_prob=(True,))
        megatron_fields |= _SIGMOID
    return {
        "num_experts": hf.n_routed_experts,
        "topk": hf.num_experts_per_tok,
        "expert_ffn_size": hf.moe_intermediate_size,
        "moe_layers": _sparse_layers(hf),
        "num_mtp_layers": getattr(hf, "num_nextn_predict_layers", None) or 0,
        "expert_groups": None if as_megatron else groups,
        "megatron_fields": megatron_fields,
    }


def _sparse_layers(hf: PretrainedConfig) -> tuple[int, ...]:
    kinds = getattr(hf, "mlp_layer_types", None)
    if kinds is None:
        return tuple(range(hf.first_k_dense_replace, hf.num_hidden_layers))
    return tuple(layer for layer, kind in enumerate(kinds) if kind == "sparse")


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
    refuse_others(
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
    return common_shape(hf, rope_types=("default", "yarn"), **fields)


def deepseek_v2(hf: PretrainedConfig) -> ModelShape:
    """Read a DeepSeek-V2 config: latent attention, softmax router, dense and shared experts."""
    refuse_others(hf, norm_topk_prob=(False,), mlp_bias=(False,))
    refuse_others(hf, topk_method=("greedy", "group_limited_greedy"))
    if hf.topk_method == "greedy":
        # Some libraries go by the method, others by the number.
        refuse_others(hf, n_group=(1,))
    shape = _deepseek(hf, sigmoid=False)
    return replace(shape, megatron_fields={**shape.megatron_fields, "moe_router_pre_softmax": True})


def deepseek_v3(hf: PretrainedConfig) -> ModelShape:
    """Read a DeepSeek-V3 config: as V2, with a sigmoid router, expert bias and groups."""
    refuse_others(hf, topk_method=("noaux_tc",))
    return _deepseek(hf, sigmoid=True)


def glm4_moe_lite(hf: PretrainedConfig) -> ModelShape:
    """Read a GLM-4-MoE-Lite config: as DeepSeek-V3, with its dense layers in a list."""
    return _deepseek(hf, sigmoid=True)


def glm4_moe(hf: PretrainedConfig) -> ModelShape:
    """Read a GLM-4-MoE config: grouped-query attention, the router of DeepSeek-V3."""
    fields = _dense_first(hf, sigmoid=True)
    fields["megatron_fields"] |= {
        "qk_layernorm": hf.use_qk_norm,
        "add_qkv_bias": hf.attention_bias,
    }
    return common_shape(hf, partial_rotary=True, **fields)


def dots1(hf: PretrainedConfig) -> ModelShape:
    """Read a dots.llm1 config: query and key norms, the router of DeepSeek-V3."""
    # With it the output projection has a bias too.
    refuse_others(hf, attention_bias=(False,))
    fields = _dense_first(hf, sigmoid=True)
    fields["megatron_fields"] |= {"qk_layernorm": True}
    return common_shape(hf, has_windows=True, **fields)


def minimax_m2(hf: PretrainedConfig) -> ModelShape:
    """Read a MiniMax-M2 config: norms over all heads, partial rotary, a biased sigmoid router."""
    refuse_others(
        hf,
        router_jitter_noise=(0.0, 0),
        # Keys of the released config, which transformers does not read.
        scoring_func=("sigmoid",),
        use_qk_norm=(True,),
        qk_norm_type=("per_layer",),
        use_routing_bias=(True,),
        shared_intermediate_size=(0,),
        attention_bias=(False,),
        sliding_window=(),
    )
    if not all(getattr(hf, "attn_type_list", None) or [1]):
        raise UnsupportedError(
            f"{hf.model_type} config has attn_type_list with 0, linear attention, which neither transformers' "
            "minimax_m2 nor this trainer has; supported: 1 in all layers"
        )
    return common_shape(
        hf,
        partial_rotary=True,
        num_experts=hf.num_local_experts,
        topk=hf.num_experts_per_tok,
        expert_ffn_size=hf.intermediate_size,
        megatron_fields={"qk_layernorm": True, **_SIGMOID},
    )


def ernie4_5_moe(hf: PretrainedConfig) -> ModelShape:
    """Read an ERNIE 4.5 config: interleaved rotary, a softmax router with a bias, shared experts.

    Its router norms weights by their sum, at least ``moe_norm_min``, which no sum is below.
    """
    refuse_others(hf, use_bias=(False,), moe_norm_min=(1e-12,))
    shared = hf.moe_num_shared_experts * hf.moe_intermediate_size
    return common_shape(
        hf,
        num_experts=hf.moe_num_experts,
        topk=hf.moe_k,
        expert_ffn_size=hf.moe_intermediate_size,
        moe_layers=tuple(
            layer
            for layer in range(hf.moe_layer_start_index, hf.moe_layer_end_index + 1)
            if (layer + 1) % hf.moe_layer_interval == 0 and layer < hf.num_hidden_layers
        ),
        num_mtp_layers=getattr(hf, "num_nextn_predict_layers", None) or 0,
        biased_softmax=True,
        megatron_fields={
            "rotary_interleaved": True,
            **({"moe_shared_expert_intermediate_size": shared} if shared else {}),
        },
    )


def gpt_oss(hf: PretrainedConfig) -> ModelShape:
    """Read a gpt-oss config: sinks, sliding windows, biases everywhere, a clamped activation."""
    # Megatron's quick GELU has this alpha built in.
    refuse_others(hf, attention_bias=(True,), swiglu_alpha=(1.702,))
    return common_shape(
        hf,
        rope_types=("default", "yarn"),
        has_windows=True,
        num_experts=hf.num_local_experts,
        topk=hf.num_experts_per_tok,
        expert_ffn_size=hf.intermediate_size,
        megatron_fields={
            "add_bias_linear": True,
            "softmax_type": "learnable",
            "activation_func": quick_gelu,
            "activation_func_clamp_value": hf.swiglu_limit,
            "glu_linear_offset": 1.0,
            # Its kernel takes no biases of experts.
            "bias_dropout_fusion": False,
        },
    )
