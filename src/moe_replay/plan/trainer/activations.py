"""Activations: the bytes that a decoder layer keeps for its backward pass.

In: ModelShape, layout, kernels, the rows of a microbatch. Out: bytes of one rank, by the part of
the layer that keeps them, because recomputation frees some parts and not others.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_replay.megatron.families.family import ModelShape
from moe_replay.plan.trainer.kernels import Kernels
from moe_replay.plan.trainer.settings import Settings
from moe_replay.plan.trainer.weights import LatentSizes, shared_width
from moe_replay.recipe.sections.training import MegatronSection


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBytes:
    """What one decoder layer keeps on a rank, in bytes."""

    hidden: float
    """One hidden row each: what a recomputed layer keeps."""
    norms: float
    """What enters the norms."""
    normed: float
    """What the norms compute and return."""
    attention: float
    """Projections, rotation."""
    core: float
    """Core attention, which returns to its own inputs when it is recomputed."""
    attended: float
    """Attention's weights, where they are kept: part of ``core``."""
    router: float
    """Scores, indices, masks."""
    experts: float
    """Rows of routed experts before their activation function."""
    gated: float
    """Rows of routed experts after it."""
    shared: float
    """Shared experts."""
    dense: float
    """The MLP of a layer without experts."""
    dispatcher: float
    """What stays of the router's although it is recomputed."""
    dispatched: float
    """One hidden row for each expert of a token."""

    @property
    def whole(self) -> float:
        """All that a layer keeps without recomputation."""
        return (
            self.norms
            + self.normed
            + self.attention
            + self.core
            + self.router
            + self.experts
            + self.gated
            + self.shared
            + self.dense
        )

    def recomputed_by(self, module: str) -> float:
        """Return what selective recomputation of a module frees.

        Raises:
            KeyError: it is none of Megatron-Core's names.
        """
        return {
            "moe": self.router + self.experts + self.gated + self.shared - self.dispatcher,
            "core_attn": self.core,
            "moe_act": self.gated,
            "layernorm": self.normed,
            "mlp": self.dense,
            "mla_up_proj": self.attention / 2,
            "shared_experts": self.shared,
        }.get(module, 0.0)


def layer_bytes(
    shape: ModelShape, settings: Settings, kernels: Kernels, *, is_moe: bool
) -> LayerBytes:
    """Return what a layer keeps of one microbatch of ``settings.max_tokens`` tokens."""
    layout, number = settings.layout, settings.dtype_bytes
    rows = settings.max_tokens / layout.context_parallel_size
    # Heads and inner widths are cut over tensor-parallel ranks, hidden rows dealt to them.
    part = rows / layout.tensor_model_parallel_size
    hidden = shape.hidden_size * number * part
    heads, core, uncut = _attention(shape, settings, kernels)
    gated, weighted = 2 + kernels.gated_copies, kernels.weighted_copies
    routed = part * shape.topk * is_moe
    inner = routed * shape.expert_ffn_size * number
    experts = shape.num_experts * part * is_moe
    choices = kernels.router_bytes_per_choice * routed
    shared = shared_width(shape) * gated * number * part * is_moe
    if is_moe and shape.megatron_fields.get("moe_shared_expert_gate"):
        shared += hidden
    return LayerBytes(
        hidden=hidden,
        norms=2 * hidden,
        normed=2 * kernels.norm_copies * hidden,
        attention=heads * part + uncut * rows,
        core=core * part,
        attended=core * part if _keeps_weights(shape, kernels) else 0.0,
        router=kernels.router_bytes_per_expert * experts + choices,
        # With tensor parallelism inside experts each of their ranks takes the rows of all of them.
        experts=shape.topk * hidden * layout.expert_tensor_size * is_moe + 2 * inner,
        gated=(kernels.gated_copies + weighted) * inner,
        shared=shared,
        dense=0 if is_moe else shape.ffn_size * gated * number * part,
        dispatcher=kernels.dispatcher_bytes_per_expert * experts
        + (kernels.dispatcher_bytes_per_expert > 0) * 4 * routed,
        dispatched=shape.topk * hidden * layout.expert_tensor_size * is_moe,
    )


def has_sinks(shape: ModelShape) -> bool:
    """Whether attention has a learned score more in each head (gpt-oss)."""
    return shape.megatron_fields.get("softmax_type") == "learnable"


def _attention(
    shape: ModelShape, settings: Settings, kernels: Kernels
) -> tuple[float, float, float]:
    """Return bytes a row: of projections and heads, of core attention, of what is not cut."""
    number, heads, groups = settings.dtype_bytes, shape.num_attention_heads, shape.num_query_groups
    if shape.megatron_fields.get("multi_latent_attention"):
        return _latent(shape, settings, kernels)
    width = shape.head_dim
    queries, both, all_three = (
        count * width for count in (heads, heads + groups, heads + 2 * groups)
    )
    numbers = kernels.projection * all_three
    if shape.megatron_fields.get("qk_layernorm"):
        numbers = kernels.normed_projection * all_three + kernels.separate_queries * queries
    numbers += kernels.core_inputs * all_three + kernels.core_queries_keys * both
    # The output projection keeps one output in any case.
    numbers += queries
    core = (kernels.core_outputs - 1) * queries * number + 4 * heads
    if _keeps_weights(shape, kernels):
        # The softmax in float32 and, in lower precision, its copy; the mask; keys and values,
        # repeated for each head.
        copies = 4 + (number if number < 4 else 0)
        core = (heads * copies + 1) * settings.max_sequence_length + 2 * queries * number
    uncut = kernels.rotary_bytes * width + kernels.index_bytes
    return numbers * number, core, uncut


def _latent(shape: ModelShape, settings: Settings, kernels: Kernels) -> tuple[float, float, float]:
    number, heads, sizes = settings.dtype_bytes, shape.num_attention_heads, LatentSizes.of(shape)
    compressed = (kernels.norm_copies + 1) * sizes.query_rank
    compressed += sizes.rank + sizes.rotary + kernels.norm_copies * sizes.rank
    of_query, of_projection, of_value = kernels.latent_heads
    numbers = heads * (
        of_query * sizes.query
        + of_projection * (sizes.plain + sizes.value)
        + of_value * sizes.value
    )
    core = 4.0 * heads
    if _keeps_weights(shape, kernels):
        core = heads * settings.max_sequence_length * number
    uncut = kernels.rotary_bytes * sizes.rotary + kernels.index_bytes
    # Compressed rows are the same on all tensor-parallel ranks, each of which keeps its own rows.
    return (numbers + compressed) * number, core, uncut


def _keeps_weights(shape: ModelShape, kernels: Kernels) -> bool:
    if not kernels.keeps_attention_weights:
        return False
    if has_sinks(shape):
        return True
    if not shape.megatron_fields.get("multi_latent_attention"):
        return False
    sizes = LatentSizes.of(shape)
    return sizes.query != sizes.value


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What a stage keeps of one microbatch, and what recomputation brings back for a while."""

    kept: float
    """Until the backward pass, in bytes."""
    recomputed: float = 0.0
    """At a time in the backward pass."""
    kept_then: float = 0.0
    """Of ``kept``, what is still there when that begins."""


def kept_by(layers: list[LayerBytes], megatron: MegatronSection) -> Kept:
    """Return what a stage of these layers keeps under ``recompute_*``."""
    dispatchers = sum(layer.dispatcher for layer in layers)
    whole = [layer.whole for layer in layers]
    if megatron.recompute_granularity is None or not layers:
        return Kept(kept=sum(whole))
    if megatron.recompute_granularity == "selective":
        modules = ["core_attn"]
        if megatron.recompute_modules is not None:
            modules = list(megatron.recompute_modules)
        freed = [sum(map(layer.recomputed_by, modules)) for layer in layers]
        kept = sum(whole) - sum(freed)
        return Kept(kept=kept, recomputed=max(freed), kept_then=kept)
    count = megatron.recompute_num_layers or 1
    if megatron.recompute_method == "block":
        # The first layers of each chunk.
        chunks = megatron.virtual_pipeline_model_parallel_size or 1
        size = -(-len(layers) // chunks)
        again = [index for index in range(len(layers)) if index % size < count]
        inputs = sum(layers[index].hidden for index in again) + dispatchers
        others = sum(whole[index] for index in range(len(layers)) if index not in again)
        # The layers behind them are through by then, in the last chunk at least.
        later = others * (chunks - 1) / chunks
        largest = max(whole[index] for index in again)
        return Kept(kept=inputs + others, recomputed=largest, kept_then=inputs + later)
    units = [layers[start : start + count] for start in range(0, len(layers), count)]
    kept = sum(unit[0].hidden for unit in units) + dispatchers
    largest = max(sum(layer.whole for layer in unit) for unit in units)
    return Kept(kept=kept, recomputed=largest, kept_then=kept)
