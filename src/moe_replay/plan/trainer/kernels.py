"""Kernels: what the implementation of a layer keeps and needs, as counts of tensors.

The same formulas (`activations`, `training`) give the bytes of a GPU and of a CPU; only these
counts differ.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """How many tensors of each width a layer keeps for each of its rows, or needs in passing.

    Kept means: from the forward pass until the backward pass.
    """

    name: str
    """What runs."""
    norm_copies: int
    """Rows kept by a norm beside its input: what it returns, and what else it computes."""
    normed_projection: int
    """Complete outputs of the query, key and value projection, kept where norms follow it."""
    projection: int
    """The same, kept where none does."""
    separate_queries: int
    """Further copies of the queries, kept where norms follow."""
    core_inputs: int
    """Copies of queries, keys and values that core attention keeps, beyond the projection."""
    core_queries_keys: int
    """Copies of rotated queries and keys that core attention keeps."""
    core_outputs: int
    """Copies of what core attention returns."""
    keeps_attention_weights: bool
    """Whether attention keeps its weights where queries and values differ in width, or with
    sinks."""
    latent_heads: tuple[int, int, int]
    """Kept for each head of latent attention: tensors of a query's width, of the width of the keys'
    up projection, of a value's width."""
    rotary_bytes: int
    """Kept for each number of a rotated head, the same for all heads: sines and cosines."""
    index_bytes: int
    """Kept for each row to put packed sequences in order."""
    gated_copies: int
    """Tensors of an MLP's inner width, beside the doubled output of its first matrix."""
    weighted_copies: int
    """Further ones of a routed expert, whose inner rows are multiplied by their probability."""
    router_bytes_per_expert: int
    """Kept for each expert of a layer: scores, masks."""
    router_bytes_per_choice: int
    """Kept for each expert of a token: indices, probabilities."""
    dispatcher_bytes_per_expert: int
    """Of these, what stays although a layer is recomputed."""
    dispatch_copies: float
    """Rows of all experts of a token that exist in passing, while the experts run."""
    exchange_copies: float
    """Further ones where these rows come from other ranks."""
    scored_dispatch_copies: float
    """All of them in a pass that keeps nothing."""
    scored_attention_weights: float
    """Copies of attention's weights, where it keeps them, in a pass that keeps nothing."""
    gradient_copies: float
    """Hidden rows that exist in passing, while a layer's gradient is computed."""
    backward_frac: float
    """What else exists meanwhile, in parts of what the layer keeps."""
    other_bytes: int
    """On every rank beside tensors: the CUDA context, libraries, buffers of NCCL."""


GPU = Kernels(
    name="Transformer Engine's layers, flash attention",
    norm_copies=1,
    normed_projection=1,
    projection=1,
    separate_queries=0,
    core_inputs=0,
    core_queries_keys=1,
    core_outputs=1,
    keeps_attention_weights=False,
    latent_heads=(3, 1, 1),
    rotary_bytes=0,
    index_bytes=0,
    gated_copies=1,
    weighted_copies=0,
    router_bytes_per_expert=16,
    router_bytes_per_choice=0,
    dispatcher_bytes_per_expert=0,
    dispatch_copies=0,
    exchange_copies=0,
    scored_dispatch_copies=5,
    scored_attention_weights=0,
    gradient_copies=0,
    backward_frac=0.5,
    other_bytes=4 * 10**9,
)
"""Of a GPU. Source: counts of the tensors that each backward pass reads; not run on a GPU."""

CPU = Kernels(
    name="Megatron-Core's local layers, attention of torch",
    norm_copies=1,
    normed_projection=1,
    projection=1,
    separate_queries=1,
    core_inputs=0,
    core_queries_keys=1,
    core_outputs=1,
    keeps_attention_weights=True,
    latent_heads=(2, 1, 1),
    rotary_bytes=4,
    index_bytes=0,
    gated_copies=3,
    weighted_copies=1,
    router_bytes_per_expert=10,
    router_bytes_per_choice=24,
    dispatcher_bytes_per_expert=5,
    dispatch_copies=2,
    exchange_copies=1,
    scored_dispatch_copies=3,
    scored_attention_weights=2,
    gradient_copies=2,
    backward_frac=0,
    other_bytes=0,
)
"""Of a CPU, where the formulas are compared with measured peaks; sequences have equal lengths."""

GPU_LOCAL = replace(CPU, other_bytes=GPU.other_bytes)
"""Of a GPU without Transformer Engine's layers: the CPU's counts; not run on a GPU."""
