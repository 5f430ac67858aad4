"""A Megatron GPT model for a Hugging Face checkpoint: its config, its layers, its routers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import (
    MLATransformerConfig,
    TransformerConfig,
)

from moe_replay.checkpoint.config import load_config, read_config_json, refuse_nested
from moe_replay.errors import UnsupportedError
from moe_replay.megatron.balance import count_tokens_only
from moe_replay.megatron.chunks import moe_layers
from moe_replay.megatron.families.family import ModelShape
from moe_replay.megatron.families.rules import family_of
from moe_replay.megatron.replay.expert_groups import BIAS_NAME, BiasedSoftmax
from moe_replay.megatron.upstream import compat
from moe_replay.megatron.upstream.warnings import quiet_megatron
from moe_replay.recipe.sections.training import ParallelLayout

__all__ = ["ModelShape", "build_model", "read_model_shape", "transformer_config"]


def read_model_shape(checkpoint_dir: str | Path) -> ModelShape:
    """Read a Hugging Face checkpoint's config.json, with transformers' defaults for what it omits.

    Raises:
        RecipeError: config.json is missing, or its values fit no model.
        UnsupportedError: the architecture, or an option of it, has no exact Megatron counterpart.
    """
    path = Path(checkpoint_dir)
    raw = read_config_json(path)
    refuse_nested(raw, path / "config.json")
    family = family_of(raw["model_type"])
    return family.shape(load_config(path))


def transformer_config(
    shape: ModelShape,
    layout: ParallelLayout,
    *,
    dtype: torch.dtype = torch.float32,
    overrides: Mapping[str, Any] | None = None,
    local_layers: bool = False,
) -> TransformerConfig:
    """Translate a model shape and a layout into Megatron's configuration.

    `local_layers` does without those of Transformer Engine where it is installed. `overrides` are
    further TransformerConfig fields, such as recompute settings;
    `moe_aux_loss_coeff` above 0 brings the load-balancing loss with it. Megatron's own
    `moe_enable_routing_replay` stays off: our replay scope attaches itself to the routers.

    Raises:
        UnsupportedError: the layout cannot split the model exactly, or an option does not fit it.
    """
    overrides = ({"moe_grouped_gemm": False} if local_layers else {}) | dict(overrides or {})
    _check_overrides(shape, layout, overrides)
    _check_divisible(shape, layout)
    fields = config_fields(shape, layout, dtype=dtype, overrides=overrides)
    try:
        with quiet_megatron():
            config = _config_class(fields)(**fields)
    except (ValueError, AssertionError, ImportError) as error:
        raise UnsupportedError(
            f"Megatron-Core {'.'.join(map(str, compat.VERSION))} refuses this model in this layout: {error}"
        ) from error
    for name, value in shape.yarn.items():
        setattr(config, f"yarn_{name}", value)
    num_chunks = layout.virtual_pipeline_model_parallel_size
    if config.virtual_pipeline_model_parallel_size != num_chunks:
        raise UnsupportedError(
            f"pipeline_model_parallel_layout {layout.pipeline_model_parallel_layout!r} has "
            f"{config.virtual_pipeline_model_parallel_size} chunks a stage, "
            f"virtual_pipeline_model_parallel_size is {num_chunks}; set it to the number in the layout"
        )
    return config


def asked_config(
    shape: ModelShape,
    layout: ParallelLayout,
    *,
    dtype: torch.dtype = torch.float32,
    overrides: Mapping[str, Any] | None = None,
) -> SimpleNamespace:
    """Return the fields of the configuration as they are asked for, whatever Megatron says to them.

    A refusal of replay is worth more than that of a package that the same option needs.
    """
    fields = config_fields(shape, layout, dtype=dtype, overrides=overrides or {})
    defaults = {
        each.name: each.default
        for each in dataclasses.fields(_config_class(fields))
        if each.default is not dataclasses.MISSING
    }
    return SimpleNamespace(**defaults | fields)


def config_fields(
    shape: ModelShape,
    layout: ParallelLayout,
    *,
    dtype: torch.dtype,
    overrides: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the arguments of Megatron's configuration; nothing is checked."""
    fields = _fields(shape, layout, dtype)
    if shape.num_experts:
        balances = bool(overrides.get("moe_aux_loss_coeff"))
        fields |= {
            "num_moe_experts": shape.num_experts,
            "moe_router_topk": shape.topk,
            "moe_ffn_hidden_size": shape.expert_ffn_size,
            "moe_layer_freq": [int(layer in shape.moe_layers) for layer in range(shape.num_layers)],
            "moe_router_load_balancing_type": "aux_loss" if balances else "none",
            "moe_router_dtype": "fp32",
            "moe_grouped_gemm": compat.transformer_engine_usable(),
        }
    fields |= dict(shape.megatron_fields) | dict(overrides)
    if fields["moe_token_dispatcher_type"] == "allgather":
        # Every rank must then bring equally many rows, so their number need not travel along the
        # pipeline either.
        fields["variable_seq_lengths"] = False
    return fields


def _config_class(fields: Mapping[str, Any]) -> type[TransformerConfig]:
    latent = fields.get("multi_latent_attention", False)
    return MLATransformerConfig if latent else TransformerConfig


def _check_overrides(
    shape: ModelShape, layout: ParallelLayout, overrides: Mapping[str, Any]
) -> None:
    if overrides.get("moe_enable_routing_replay"):
        raise UnsupportedError(
            "moe_enable_routing_replay = True: Megatron's process-global replay would compete with the replay "
            "scope; leave it off and use moe_replay.megatron.replay"
        )
    if overrides.get("moe_aux_loss_coeff") and not shape.num_experts:
        raise UnsupportedError(
            f"moe_aux_loss_coeff = {overrides['moe_aux_loss_coeff']}, but the {shape.family} checkpoint is dense and has "
            "no experts to balance; set it to 0"
        )
    all_gathers = overrides.get("moe_token_dispatcher_type") == "allgather"
    if all_gathers and layout.pipeline_model_parallel_size > 1:
        raise UnsupportedError(
            "moe_token_dispatcher_type = 'allgather' with pipeline_model_parallel_size = "
            f"{layout.pipeline_model_parallel_size}: this dispatcher refuses batches of varying length, which packed "
            "microbatches are; use 'alltoall'"
        )


def _fields(shape: ModelShape, layout: ParallelLayout, dtype: torch.dtype) -> dict[str, Any]:
    """Return what follows from the architecture, the layout and the device, for any model."""
    on_cuda = torch.cuda.is_available()
    return {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.head_dim,
        "ffn_hidden_size": shape.ffn_size,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "moe_token_dispatcher_type": "alltoall",
        # The layout's keys bear Megatron's own names.
        **layout.model_dump(include=set(ParallelLayout.model_fields)),
        "sequence_parallel": layout.tensor_model_parallel_size > 1,
        "variable_seq_lengths": True,
        # With batched p2p, interleaving over two stages mixes up activations silently.
        "batch_p2p_comm": False,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "use_cpu_initialization": not on_cuda,
        # The weights come from a checkpoint; build_model fills them with NaN until then.
        "perform_initialization": False,
        "calculate_per_token_loss": True,
        "persist_layer_norm": False,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": on_cuda,
        "gradient_accumulation_fusion": False,
    }


def build_model(
    shape: ModelShape,
    config: TransformerConfig,
    *,
    grouped_experts: bool = False,
    local_layers: bool = False,
) -> list[GPTModel]:
    """Build this rank's model chunks: one, or one for each virtual pipeline stage.

    Parameters and expert biases are NaN until `load_hf_weights` or a checkpoint fills them.
    `grouped_experts` runs the local experts in two grouped products without Transformer Engine;
    with it experts are always grouped. `local_layers` is that of `transformer_config`.
    """
    num_virtual = config.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(num_virtual or 1):
        vp_stage = stage if num_virtual else None
        spec = compat.decoder_block_spec(
            config,
            vp_stage=vp_stage,
            all_heads_qk_norm=family_of(shape.family).all_heads_qk_norm,
            grouped_experts=grouped_experts,
            local_layers=local_layers,
        )
        with quiet_megatron():
            chunk = GPTModel(
                config=config,
                transformer_layer_spec=spec,
                # Padded to equal parts; the rows of no word are never part of a softmax.
                vocab_size=shape.vocab_size + -shape.vocab_size % config.tensor_model_parallel_size,
                max_sequence_length=shape.max_position_embeddings,
                pre_process=parallel_state.is_pipeline_first_stage(
                    ignore_virtual=False, vp_stage=vp_stage
                ),
                post_process=parallel_state.is_pipeline_last_stage(
                    ignore_virtual=False, vp_stage=vp_stage
                ),
                position_embedding_type="yarn" if shape.yarn else "rope",
                rotary_base=shape.rotary_base,
                rotary_percent=shape.rotary_frac,
                share_embeddings_and_output_weights=shape.tie_word_embeddings,
                vp_stage=vp_stage,
            )
        chunk.model_shape = shape
        compat.mark_cut_parameters(chunk)
        compat.mark_expert_gradients(chunk)
        routers = moe_layers([chunk]).values()
        count_tokens_only(routers, scaled_by_group=compat.AUX_LOSS_SCALED_BY_GROUP)
        _choose_as_the_model(shape, routers)
        if torch.cuda.is_available():
            chunk.cuda(torch.cuda.current_device())
        with torch.no_grad():
            for parameter in chunk.parameters():
                parameter.fill_(torch.nan)
            for router in routers:
                for name in ("expert_bias", BIAS_NAME):
                    if getattr(router, name, None) is not None:
                        getattr(router, name).fill_(torch.nan)
        chunks.append(chunk)
    return chunks


def _choose_as_the_model(shape: ModelShape, routers: Iterable[TopKRouter]) -> None:
    for router in routers:
        if shape.expert_groups:
            router.router_replay = shape.expert_groups
        if shape.biased_softmax:
            router.router_replay = BiasedSoftmax(router)


def _check_divisible(shape: ModelShape, layout: ParallelLayout) -> None:
    tensor = layout.tensor_model_parallel_size
    if family_of(shape.family).all_heads_qk_norm and shape.num_query_groups % tensor:
        raise UnsupportedError(
            f"{shape.family}: the query and key norms span all heads, and of {shape.num_query_groups} key heads ranks of "
            f"tensor parallelism {tensor} would share one; choose a degree that divides {shape.num_query_groups}"
        )
    for name, size, axis, degree in (
        ("num_attention_heads", shape.num_attention_heads, "tensor", tensor),
        ("ffn_size", shape.ffn_size, "tensor", tensor),
        ("num_experts", shape.num_experts, "expert", layout.expert_model_parallel_size),
        ("expert_ffn_size", shape.expert_ffn_size, "expert tensor", layout.expert_tensor_size),
    ):
        if size % degree:
            raise UnsupportedError(
                f"{shape.family}: {name} = {size} cannot be split over {axis} parallelism {degree}; choose a "
                f"degree that divides {size}"
            )
    if shape.num_query_groups % tensor and tensor % shape.num_query_groups:
        raise UnsupportedError(
            f"{shape.family}: num_query_groups = {shape.num_query_groups} key and value heads cannot be shared by tensor "
            f"parallelism {tensor}; choose a degree that divides {shape.num_query_groups}, or a multiple of it"
        )
    if shape.vocab_size < tensor**2:
        raise UnsupportedError(
            f"{shape.family}: vocab_size = {shape.vocab_size} leaves a rank of tensor parallelism {tensor} without a word; "
            f"choose a degree of at most {math.isqrt(shape.vocab_size)}"
        )
    chunks = layout.pipeline_model_parallel_size * (
        layout.virtual_pipeline_model_parallel_size or 1
    )
    dealt_evenly = not (
        layout.num_layers_in_first_pipeline_stage
        or layout.num_layers_in_last_pipeline_stage
        or layout.pipeline_model_parallel_layout
    )
    if dealt_evenly and shape.num_layers % chunks:
        raise UnsupportedError(
            f"{shape.family}: {shape.num_layers} layers cannot be dealt evenly over {chunks} pipeline chunks; choose "
            f"degrees that divide {shape.num_layers}, or set num_layers_in_first_pipeline_stage, "
            "num_layers_in_last_pipeline_stage or pipeline_model_parallel_layout"
        )
