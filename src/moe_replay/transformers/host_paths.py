"""Steps of Hugging Face models that are slow on a CPU, with equal results in less time.

For models without gradients. Each function has the arguments of transformers' own, takes the
shortcut where it is exact to rounding, and leaves everything else to transformers.

In: a transformers model. Out: `use_host_paths`.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "moe_replay_host"
"""Of both paths in transformers' tables."""
# One grouped product calls the BLAS once an expert, about 4 us a call beside the product. On one
# thread of 90 GFLOP/s this is the work of padding rows that costs as much.
_SPARE_FLOP = 600_000


def use_host_paths(model: Any) -> None:
    """Run ``model``'s attention to one token, and its experts of few rows, by the functions here.

    Changes nothing on a device that has kernels for both, in another number format than float32,
    whose rounding would differ, and where the model's own choice is not the usual one.
    """
    weight = next(model.parameters())
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return
    if model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation():
        AttentionInterface.register(NAME, attention_forward)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)
    if model.config._experts_implementation == "grouped_mm":
        ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
        model.set_experts_implementation(NAME)


def attention_forward(
    module: nn.Module,
    query: Float[torch.Tensor, "batch heads queries head_dim"],
    key: Float[torch.Tensor, "batch key_heads tokens head_dim"],
    value: Float[torch.Tensor, "batch key_heads tokens value_dim"],
    attention_mask: Bool[torch.Tensor, "batch 1 queries tokens"] | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Float[torch.Tensor, "batch queries heads value_dim"], None]:
    """Attend from one token a sequence by two batched products over the heads that share a key.

    128 sequences of 52 tokens, 4 heads over 2: 0.23 ms on one thread, where SDPA takes 0.33.
    """
    special = ("position_bias", "softcap", "cache", "output_attentions")
    is_masked = attention_mask is not None
    if (
        query.shape[2] != 1
        or scaling is None
        or dropout
        or (is_masked and (attention_mask.dtype != torch.bool or attention_mask.shape[1] != 1))
        or any(options.get(option) for option in special)
    ):
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            **options,
        )
    batch, heads, _, head_dim = query.shape
    key_heads = key.shape[1]
    shared = query.reshape(batch, key_heads, heads // key_heads, head_dim) * scaling
    scores = shared @ key.transpose(2, 3)
    if is_masked:
        scores.masked_fill_(attention_mask.logical_not(), -torch.inf)
    attended = scores.softmax(dim=-1) @ value
    return attended.view(batch, 1, heads, -1), None


def experts_forward(
    experts: Any,
    hidden_states: Float[torch.Tensor, "tokens hidden"],
    top_k_index: Int64[torch.Tensor, "tokens topk"],
    top_k_weights: Float[torch.Tensor, "tokens topk"],
) -> Float[torch.Tensor, "tokens hidden"]:
    """Run all experts in two batched products, each padded to the rows of the busiest expert.

    Example:
        Two tokens that chose experts (0, 2) and (2, 1) of 3 fill 1, 1 and 2 rows; padded to 2, the
        products see six rows, and read the token 0 where there is none::

            expert    0     1     2
            rows      0 1   2 3   4 5
            tokens    0 .   1 .   0 1
    """
    if experts.has_bias or experts.has_post_expert_norm or experts._is_expert_parallel:
        return grouped_mm_experts_forward(experts, hidden_states, top_k_index, top_k_weights)
    up, down = experts.gate_up_proj if experts.has_gate else experts.up_proj, experts.down_proj
    num_experts, (num_tokens, topk) = len(up), top_k_index.shape
    chosen = top_k_index.reshape(-1)
    counts = chosen.bincount(minlength=num_experts)
    num_rows = int(counts.max())
    num_padding = num_rows * num_experts - len(chosen)
    if num_padding * 2 * (up[0].numel() + down[0].numel()) > _SPARE_FLOP * num_experts:
        return grouped_mm_experts_forward(experts, hidden_states, top_k_index, top_k_weights)
    ordered, order = chosen.sort()
    # Where the rows of an expert start, less how many rows experts before it have.
    starts = torch.arange(num_experts) * num_rows - (counts.cumsum(0) - counts)
    places = starts.index_select(0, ordered) + torch.arange(len(chosen))
    tokens = chosen.new_zeros(num_experts * num_rows).index_copy_(0, places, order // topk)
    row_of = torch.empty_like(order).index_copy_(0, order, places)
    rows = hidden_states.index_select(0, tokens).view(num_experts, num_rows, -1)
    inner = torch.bmm(rows, up if experts.is_transposed else up.transpose(1, 2))
    inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    outer = torch.bmm(inner, down if experts.is_transposed else down.transpose(1, 2))
    found = outer.flatten(0, 1).index_select(0, row_of).view(num_tokens, topk, -1)
    return torch.bmm(top_k_weights[:, None].to(found.dtype), found)[:, 0]
