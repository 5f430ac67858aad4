"""The parameters of adapters on one rank, from the shape of a model, without building anything.

In: ModelShape, layout, ``[lora]``, the layers of a stage. Out: the size of each matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from moe_replay.megatron.families.family import Kind, ModelShape
from moe_replay.megatron.families.rules import family_of
from moe_replay.megatron.lora.attach import projections, targets_of
from moe_replay.plan.trainer.weights import LatentSizes, Weight, shared_width
from moe_replay.recipe.sections.lora import LoraSection
from moe_replay.recipe.sections.training import ParallelLayout

_EXPERTS = "mlp.experts.local_experts.{expert}"
_SHARED = "mlp.shared_experts"

Sizes = tuple[int, tuple[int, ...]]
"""Inputs of a linear layer, and the outputs of each projection in it."""


def adapter_weights(
    shape: ModelShape, layout: ParallelLayout, lora: LoraSection, layers: Sequence[int]
) -> list[Weight]:
    """Return the matrices that a rank trains in ``layers``.

    Raises:
        UnsupportedError: the model has no projection of a name in ``lora.target_modules``.
    """
    targets = targets_of(shape, lora)
    return [
        weight
        for layer in layers
        for weight in _layer(shape, layout, lora.rank, targets, is_moe=layer in shape.moe_layers)
    ]


def _layer(
    shape: ModelShape, layout: ParallelLayout, rank: int, targets: frozenset[str], *, is_moe: bool
) -> Iterator[Weight]:
    sizes = _linear_layers(shape, is_moe=is_moe)
    for rule in family_of(shape.family).rules:
        module = rule.megatron.partition("{layer}.")[2].removesuffix(".weight")
        names = projections(rule)
        if not names or module not in sizes:
            continue
        inputs, outputs = sizes[module]
        is_expert = module.startswith(_EXPERTS)
        count = shape.num_experts // layout.expert_model_parallel_size if is_expert else 1
        # Experts with adapters are not cut, and neither are the down projections of latent
        # attention.
        tensor = layout.tensor_model_parallel_size
        cut = 1 if is_expert or rule.kind is Kind.WHOLE else tensor
        of_a, of_b = (cut, 1) if rule.kind is Kind.ROW else (1, cut)
        for name, rows in zip(names, outputs, strict=True):
            if name in targets:
                for matrix, size in (("A", inputs // of_a), ("B", rows // of_b)):
                    yield Weight(
                        name=f"{module}.{name}.lora_{matrix}",
                        size=size * rank,
                        is_expert=is_expert,
                        count=count,
                    )


def _linear_layers(shape: ModelShape, *, is_moe: bool) -> Mapping[str, Sizes]:
    """Return the linear layers of a decoder layer by their names in Megatron, uncut."""
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    found: dict[str, Sizes] = {}
    if shape.megatron_fields.get("multi_latent_attention"):
        latent = LatentSizes.of(shape)
        queries = heads * latent.query
        found["linear_proj"] = heads * latent.value, (hidden,)
        if latent.query_rank:
            found["linear_q_down_proj"] = hidden, (latent.query_rank,)
            found["linear_q_up_proj"] = latent.query_rank, (queries,)
        else:
            found["linear_q_proj"] = hidden, (queries,)
        found["linear_kv_down_proj"] = hidden, (latent.rank + latent.rotary,)
        found["linear_kv_up_proj"] = latent.rank, (heads * (latent.plain + latent.value),)
    else:
        queries, keys = heads * shape.head_dim, shape.num_query_groups * shape.head_dim
        found["linear_qkv"] = hidden, (queries, keys, keys)
        found["linear_proj"] = queries, (hidden,)
    found = {f"self_attention.{name}": sizes for name, sizes in found.items()}
    inner = {"mlp": shape.ffn_size}
    if is_moe:
        inner = {_EXPERTS: shape.expert_ffn_size}
        if shared_width(shape):
            inner[_SHARED] = shared_width(shape)
    for module, width in inner.items():
        found[f"{module}.linear_fc1"] = hidden, (width, width)
        found[f"{module}.linear_fc2"] = width, (hidden,)
    return found
