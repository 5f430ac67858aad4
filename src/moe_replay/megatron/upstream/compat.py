"""Imports and calls of Megatron-Core that differ from 0.16 to 0.19, or with Transformer Engine.

What has to be repaired in Megatron's own modules is in `missing_packages` and `no_cuda`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from moe_replay.megatron.upstream.attention import SDPACoreAttention
from moe_replay.megatron.upstream.layers import (
    AllHeadsKeyNorm,
    AllHeadsQueryNorm,
    GroupedExperts,
    ReplicatedLinear,
    RMSNorm,
)
from moe_replay.megatron.upstream.missing_packages import has_transformer_engine
from moe_replay.megatron.upstream.version import check_installed
from moe_replay.megatron.upstream.warnings import quiet_megatron

VERSION = check_installed()
# From 0.19 on the tokens that weigh the auxiliary loss are multiplied by the ranks that share a
# sequence.
AUX_LOSS_SCALED_BY_GROUP = VERSION >= (0, 19)


def transformer_engine_usable() -> bool:
    """Whether Transformer Engine's layers can be built here: it is installed and there is CUDA."""
    return torch.cuda.is_available() and has_transformer_engine()


def mark_cut_parameters(chunk: torch.nn.Module) -> None:
    """Mark the parameters that tensor parallelism cuts.

    Megatron's local layers do it only while they initialise their weights, which a model that waits
    for a checkpoint skips. Unmarked, the parts of all ranks but the first are taken for copies:
    they count nothing in the gradient's norm, and gradients are clipped too little.
    """
    _rename_all_heads_norms(chunk)
    dims = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
    for module in chunk.modules():
        dim = next((d for kind, d in dims.items() if isinstance(module, kind)), None)
        weight = getattr(module, "weight", None)
        if dim is not None and weight is not None and not hasattr(weight, "partition_dim"):
            set_tensor_model_parallel_attributes(weight, True, dim, 1)


def _rename_all_heads_norms(chunk: torch.nn.Module) -> None:
    """Give norms over all heads another name than Megatron's, under which they are not cut.

    By the names of its own, `q_layernorm` and `k_layernorm`, Megatron sums their gradients over
    tensor-parallel ranks, which here hold different heads.
    """
    for attention in list(chunk.modules()):
        for name, other in (("q_layernorm", "query_norm"), ("k_layernorm", "key_norm")):
            norm = attention._modules.get(name)
            if isinstance(norm, AllHeadsQueryNorm | AllHeadsKeyNorm):
                del attention._modules[name]
                attention.add_module(other, norm)
                # Attention calls it by the first name: an attribute, not a second module.
                object.__setattr__(attention, name, norm)


def mark_expert_gradients(chunk: torch.nn.Module) -> None:
    """Sum expert gradients over the ranks of the same experts, with optimizer state of their own.

    Before 0.19 Megatron does so only where there is expert parallelism. Without it, gradients are
    silently wrong if experts are cut over another number of ranks than dense layers, and the
    optimizer's state does not load into a layout with expert parallelism. Biases of experts are
    marked as if they saw part of a sequence: their gradients would be summed over tensor-parallel
    ranks once more. To be called before the chunk is wrapped in DistributedDataParallel.
    """
    experts: dict[str, Any] = {
        name: p for name, p in chunk.named_parameters() if ".mlp.experts." in name
    }
    for name, parameter in experts.items():
        parameter.allreduce = False
        parameter.sequence_parallel = False
        if ".linear_fc2.bias" in name:
            # Else taken for a copy, and not counted in the norm, where dense layers are cut.
            parameter.tensor_model_parallel = True


def decoder_block_spec(
    config: TransformerConfig,
    *,
    vp_stage: int | None,
    all_heads_qk_norm: bool,
    grouped_experts: bool,
    local_layers: bool = False,
) -> TransformerBlockSubmodules:
    """Return the layer specs of one model chunk of this rank.

    Without Transformer Engine, or with ``local_layers``: Megatron's local layers with our norm,
    core attention and, if asked for, grouped experts.
    """
    transformer_engine = transformer_engine_usable() and not local_layers
    with quiet_megatron():
        block = get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=transformer_engine,
            normalization=config.normalization,
            vp_stage=vp_stage,
        )
    # Layers of one kind share one spec object.
    for layer in {id(spec): spec for spec in block.layer_specs}.values():
        attention = layer.submodules.self_attention.submodules
        if all_heads_qk_norm:
            attention.q_layernorm, attention.k_layernorm = AllHeadsQueryNorm, AllHeadsKeyNorm
        if transformer_engine:
            continue
        attention.core_attention = SDPACoreAttention
        if config.multi_latent_attention:
            attention.linear_q_down_proj = ReplicatedLinear
            attention.linear_kv_down_proj = ReplicatedLinear
        _use_own_norms(attention)
        _use_own_norms(layer.submodules)
        # Megatron's own experts add a bias in place where autograd forbids it.
        grouped = grouped_experts or config.add_bias_linear
        if grouped and hasattr(layer.submodules.mlp.submodules, "experts"):
            layer.submodules.mlp.submodules.experts = _grouped_experts_builder()
    if not transformer_engine:
        block.layer_norm = RMSNorm
    return block


def _use_own_norms(submodules: Any) -> None:
    for name in (
        "input_layernorm",
        "pre_mlp_layernorm",
        "q_layernorm",
        "k_layernorm",
        "kv_layernorm",
    ):
        current = getattr(submodules, name, None)
        if current is not None and current not in (IdentityOp, AllHeadsQueryNorm, AllHeadsKeyNorm):
            setattr(submodules, name, RMSNorm)


def _grouped_experts_builder() -> Any:
    submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    if VERSION >= (0, 17):
        return partial(GroupedExperts, submodules=submodules)
    return ModuleSpec(module=GroupedExperts, submodules=submodules)
