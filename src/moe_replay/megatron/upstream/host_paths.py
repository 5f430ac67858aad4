"""Steps of Megatron-Core that are slow without its CUDA kernels, with equal results in less time.

Each function here has the name and arguments of Megatron's, takes the shortcut where it is exact,
and leaves everything else to Megatron's own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any

import torch
from jaxtyping import Float, Int64

_MARK = "_moe_replay_packed"


def install() -> None:
    """Replace the functions in Megatron's modules; a second call changes nothing."""
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer.moe import token_dispatcher

    for module, name, shortcut in (
        (token_dispatcher, "sort_chunks_by_idxs", sort_chunks_by_idxs),
        (token_dispatcher, "unpermute", unpermute),
        (rope_utils, "_apply_rotary_pos_emb_thd", apply_rotary_pos_emb_thd),
    ):
        stock = getattr(module, name)
        if not isinstance(stock, partial):
            setattr(module, name, update_wrapper(partial(shortcut, stock), stock))


def sort_chunks_by_idxs(
    stock: Callable[..., Any],
    input: torch.Tensor,
    split_sizes: torch.Tensor,
    sorted_idxs: torch.Tensor,
    probs: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return chunks that are in order already as they are: on one expert-parallel rank all are."""
    if sorted_idxs.tolist() == list(range(len(sorted_idxs))):
        return input, probs
    return stock(input, split_sizes, sorted_idxs, probs=probs, **options)


def unpermute(
    stock: Callable[..., torch.Tensor],
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    restore_shape: torch.Size,
    probs: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """Sum the rows of each token; the gradient takes whole rows, where Megatron's takes values."""
    if probs is not None or options.get("fused") or options.get("drop_and_pad"):
        return stock(permuted_tokens, sorted_indices, restore_shape, probs=probs, **options)
    return _RowSums.apply(permuted_tokens, sorted_indices, restore_shape)


class _RowSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Float[torch.Tensor, "rows hidden"],
        tokens: Int64[torch.Tensor, " rows"],
        shape: torch.Size,
    ) -> Float[torch.Tensor, "tokens hidden"]:
        ctx.save_for_backward(tokens)
        return rows.new_zeros(shape).scatter_add_(0, tokens[:, None].expand_as(rows), rows)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (tokens,) = ctx.saved_tensors
        return gradients[0].index_select(0, tokens), None, None


def apply_rotary_pos_emb_thd(
    stock: Callable[..., torch.Tensor],
    t: torch.Tensor,
    cu_seqlens: torch.Tensor,
    freqs: torch.Tensor,
    rotary_interleaved: bool = False,
    multi_latent_attention: bool = False,
    mscale: float = 1.0,
    cp_group: Any = None,
    **options: Any,
) -> torch.Tensor:
    """Rotate packed rows by cosines and sines that all layers of a microbatch share.

    Megatron computes them for queries and keys of every layer, sequence by sequence.
    """
    if (
        rotary_interleaved
        or multi_latent_attention
        or options
        or cp_group is None
        or freqs.shape[-1] != t.shape[-1]
    ):
        return stock(
            t,
            cu_seqlens,
            freqs,
            rotary_interleaved=rotary_interleaved,
            multi_latent_attention=multi_latent_attention,
            mscale=mscale,
            cp_group=cp_group,
            **options,
        )
    # With the tensor they belong to, so they live as long as it does.
    held = getattr(freqs, _MARK, None)
    if held is None or held[0] is not cu_seqlens or held[1:3] != (t.dtype, mscale):
        packed = _packed_freqs(t, cu_seqlens, freqs, cp_group)[:, 0]
        cosines, sines = ((f(packed) * mscale).to(t.dtype) for f in (torch.cos, torch.sin))
        held = cu_seqlens, t.dtype, mscale, cosines, sines
        setattr(freqs, _MARK, held)
    return _Rotated.apply(t, *held[3:])


def _packed_freqs(
    t: torch.Tensor, cu_seqlens: torch.Tensor, freqs: torch.Tensor, cp_group: Any
) -> torch.Tensor:
    """Return the frequencies of each row of ``t``, as Megatron's own function lays them out."""
    from megatron.core.models.common.embeddings import rope_utils

    starts = cu_seqlens.tolist()
    lengths = (torch.diff(cu_seqlens) // cp_group.size()).tolist()
    # Frequencies for every row of the pack, or those of the longest sequence for each of them.
    offsets = starts if len(freqs) == starts[-1] else [0] * len(starts)
    return torch.cat(
        [
            rope_utils._get_thd_freqs_on_this_cp_rank(
                cp_group.rank(), cp_group.size(), rows, freqs, offset
            )
            for rows, offset in zip(t.split(lengths), offsets, strict=False)
        ]
    )


class _Rotated(torch.autograd.Function):
    """``t * cos + (-t2, t1) * sin`` with ``t1`` and ``t2`` the halves of the last dim."""

    @staticmethod
    def forward(
        ctx: Any, t: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(cosines, sines)
        (first, second), (of_first, of_second) = t.chunk(2, -1), sines.chunk(2, -1)
        rotated = t * cosines
        left, right = rotated.chunk(2, -1)
        left.sub_(second * of_first)
        right.add_(first * of_second)
        return rotated

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,), (cosines, sines) = gradients, ctx.saved_tensors
        (first, second), (of_first, of_second) = gradient.chunk(2, -1), sines.chunk(2, -1)
        returned = gradient * cosines
        left, right = returned.chunk(2, -1)
        left.add_(second * of_second)
        right.sub_(first * of_first)
        return returned, None, None
