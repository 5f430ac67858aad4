"""The parameters of one rank, from the shape of a model and a layout, without building anything.

In: ModelShape, layout, the layers of a stage. Out: the size of each parameter, dense ones apart
from experts, because different ranks share their optimizer state.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from moe_replay.megatron.families.family import ModelShape
from moe_replay.megatron.families.rules import family_of
from moe_replay.recipe.sections.training import ParallelLayout

# Megatron-Core begins each parameter of a buffer at a multiple of 64 numbers, and ends a buffer at
# a multiple of this and of the ranks that share it.
_START, _END = 64, 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One parameter of a rank."""

    name: str
    """What it is, in Megatron's words."""
    size: int
    """Numbers that this rank holds."""
    is_expert: bool = False
    """Whether it belongs to a routed expert."""
    count: int = 1
    """How many of them follow one another."""

    @property
    def total(self) -> int:
        """Numbers in all of them."""
        return self.size * self.count


def stage_weights(
    shape: ModelShape, layout: ParallelLayout, layers: Sequence[int], stage: int
) -> list[Weight]:
    """Return the parameters of a rank of a pipeline stage that holds ``layers``."""
    tensor = layout.tensor_model_parallel_size
    last = layout.pipeline_model_parallel_size - 1
    words = -(-shape.vocab_size // tensor) * shape.hidden_size
    weights = [Weight(name="embedding", size=words)] if stage == 0 else []
    for layer in layers:
        weights += layer_weights(shape, layout, is_moe=layer in shape.moe_layers)
    if stage == last:
        weights.append(Weight(name="final_layernorm", size=shape.hidden_size))
        # Tied stages at both ends hold a copy each.
        if last > 0 or not shape.tie_word_embeddings:
            weights.append(Weight(name="output_layer", size=words))
    return weights


def layer_weights(shape: ModelShape, layout: ParallelLayout, *, is_moe: bool) -> list[Weight]:
    """Return the parameters of a rank in one decoder layer."""
    return [
        Weight(name="input_layernorm", size=shape.hidden_size),
        *_attention(shape, layout.tensor_model_parallel_size),
        Weight(name="pre_mlp_layernorm", size=shape.hidden_size),
        *(_moe(shape, layout) if is_moe else _dense(shape, layout)),
    ]


def _attention(shape: ModelShape, tensor: int) -> Iterator[Weight]:
    fields, hidden, heads = shape.megatron_fields, shape.hidden_size, shape.num_attention_heads
    if fields.get("multi_latent_attention"):
        yield from _latent(shape, tensor)
        return
    qkv = (heads + 2 * shape.num_query_groups) * shape.head_dim
    yield Weight(name="linear_proj", size=heads * shape.head_dim // tensor * hidden)
    yield Weight(name="linear_qkv", size=qkv // tensor * hidden)
    if fields.get("add_bias_linear"):
        yield Weight(name="linear_proj.bias", size=hidden)
    if fields.get("softmax_type") == "learnable":
        yield Weight(name="softmax_offset", size=heads // tensor)
    if fields.get("add_qkv_bias") or fields.get("add_bias_linear"):
        yield Weight(name="linear_qkv.bias", size=qkv // tensor)
    if fields.get("qk_layernorm"):
        all_heads = family_of(shape.family).all_heads_qk_norm
        for name, count in (("q", heads), ("k", shape.num_query_groups)):
            yield Weight(
                name=f"{name}_layernorm",
                size=shape.head_dim * (count // tensor if all_heads else 1),
            )


def _latent(shape: ModelShape, tensor: int) -> Iterator[Weight]:
    """Yield the parameters of multi-head latent attention, whose down projections are not cut."""
    sizes, hidden, heads = LatentSizes.of(shape), shape.hidden_size, shape.num_attention_heads
    local = heads // tensor
    yield Weight(name="linear_proj", size=local * sizes.value * hidden)
    if sizes.query_rank:
        yield Weight(name="linear_q_down_proj", size=hidden * sizes.query_rank)
        yield Weight(name="q_layernorm", size=sizes.query_rank)
    width = sizes.query_rank or hidden
    yield Weight(name="linear_q_up_proj", size=width * local * sizes.query)
    yield Weight(name="linear_kv_down_proj", size=hidden * (sizes.rank + sizes.rotary))
    yield Weight(name="kv_layernorm", size=sizes.rank)
    yield Weight(name="linear_kv_up_proj", size=sizes.rank * local * (sizes.plain + sizes.value))


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSizes:
    """Widths of multi-head latent attention."""

    query_rank: int
    """Of compressed queries; 0 where they are not compressed."""
    rank: int
    """Of compressed keys and values."""
    plain: int
    """Of a head's part without position."""
    rotary: int
    """Of a head's rotated part."""
    value: int
    """Of a head's values."""

    @classmethod
    def of(cls, shape: ModelShape) -> LatentSizes:
        """Read them from the fields of a shape with latent attention."""
        fields = shape.megatron_fields
        return cls(
            query_rank=fields["q_lora_rank"] or 0,
            rank=fields["kv_lora_rank"],
            plain=fields["qk_head_dim"],
            rotary=fields["qk_pos_emb_head_dim"],
            value=fields["v_head_dim"],
        )

    @property
    def query(self) -> int:
        """Width of a head's queries and keys."""
        return self.plain + self.rotary


def shared_width(shape: ModelShape) -> int:
    """Return the inner width of all shared experts together; 0 without any."""
    return shape.megatron_fields.get("moe_shared_expert_intermediate_size") or 0


def _moe(shape: ModelShape, layout: ParallelLayout) -> Iterator[Weight]:
    hidden, tensor = shape.hidden_size, layout.tensor_model_parallel_size
    biased = bool(shape.megatron_fields.get("add_bias_linear"))
    yield Weight(name="router", size=shape.num_experts * hidden)
    if biased:
        yield Weight(name="router.bias", size=shape.num_experts)
    inner = shape.expert_ffn_size // layout.expert_tensor_size
    count = shape.num_experts // layout.expert_model_parallel_size
    # Their order does not matter to sums, and only little to how they are padded.
    yield Weight(name="experts.linear_fc1", size=2 * inner * hidden, is_expert=True, count=count)
    yield Weight(name="experts.linear_fc2", size=inner * hidden, is_expert=True, count=count)
    if biased:
        yield Weight(name="experts.linear_fc1.bias", size=2 * inner, is_expert=True, count=count)
        yield Weight(name="experts.linear_fc2.bias", size=hidden, is_expert=True, count=count)
    shared = shared_width(shape) // tensor
    if shared:
        yield Weight(name="shared_experts.linear_fc1", size=2 * shared * hidden)
        yield Weight(name="shared_experts.linear_fc2", size=shared * hidden)
    if shape.megatron_fields.get("moe_shared_expert_gate"):
        yield Weight(name="shared_experts.gate_weight", size=hidden)


def _dense(shape: ModelShape, layout: ParallelLayout) -> Iterator[Weight]:
    inner = shape.ffn_size // layout.tensor_model_parallel_size
    yield Weight(name="mlp.linear_fc1", size=2 * inner * shape.hidden_size)
    yield Weight(name="mlp.linear_fc2", size=inner * shape.hidden_size)


def buffer_size(weights: Iterable[Weight], replicas: int) -> int:
    """Return the numbers of Megatron's buffer of ``weights``, whose state ``replicas`` ranks share.

    Example: two parameters of 100 numbers begin at 0 and at 128, and end at 228, which 2 ranks
    round up to 256: 128 for each.
    """
    held = list(weights)
    if not held:
        return 0
    # The last one built is the first one in the buffer, so the first one ends it.
    end = sum(_rounded(weight.size, _START) * weight.count for weight in held)
    end -= _rounded(held[0].size, _START) - held[0].size
    return _rounded(end, math.lcm(_END, replicas))


def _rounded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
