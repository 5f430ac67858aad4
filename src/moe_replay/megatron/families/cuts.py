"""How the tensors of a checkpoint lie in a Megatron parameter, and which part each rank holds."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from moe_replay.megatron.families.family import Kind, ModelShape, Rule

CUT_DIM = {Kind.COLUMN: 0, Kind.VOCABULARY: 0, Kind.ROW: 1, Kind.QKV: 0, Kind.GATED: 1}
"""Kind -> dim of a merged tensor that tensor parallelism cuts."""


def cut_group(rule: Rule) -> dist.ProcessGroup:
    """Return the tensor-parallel group that a parameter is cut over."""
    if "{expert}" in rule.megatron:
        return parallel_state.get_expert_tensor_parallel_group()
    return parallel_state.get_tensor_model_parallel_group()


def local_view(rule: Rule, parameter: Tensor) -> Tensor:
    """View a parameter, or this rank's part of it, in the shape of a merged tensor."""
    if rule.kind is Kind.GATED:
        return parameter.reshape(2, -1, *parameter.shape[1:])
    if rule.kind is Kind.SINGLE_ROW:
        return parameter.unsqueeze(0)
    return parameter


def merge(rule: Rule, tensors: list[Tensor], shape: ModelShape) -> Tensor:
    """Join Hugging Face tensors so that a tensor-parallel cut is one chunk along one dim.

    Worked example of ``QKV``: 4 query heads in 2 groups, head size 8, hidden size 32.

        q [32, 32] -> [2, 16, 32]    k [16, 32] -> [2, 8, 32]    v as k
        joined along dim 1: [2, 32, 32], a group's queries, key and value together, as rows [64, 32]
        tensor-parallel rank r of 2 holds 32 rows: q heads 2r and 2r + 1, k and v head r
        rank r of 4, more ranks than groups, holds 16: both queries of a group, or its key and value

    Worked example of ``VOCABULARY``: 101 words on 2 ranks are 51 rows each, the last one zero.

    Worked example of ``GATED``: gate and up ``[96, 32]`` become ``[2, 96, 32]``, cut along dim 1,
    so that each rank holds the same rows of both.
    """
    if rule.kind is Kind.QKV:
        return torch.cat(
            [t.reshape(shape.num_query_groups, -1, *t.shape[1:]) for t in tensors], dim=1
        ).flatten(0, 1)
    if rule.kind is Kind.GATED:
        return torch.stack(tensors)
    (tensor,) = tensors
    if rule.kind is Kind.VOCABULARY:
        missing = -len(tensor) % cut_group(rule).size()
        return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])
    return tensor


def unmerge(rule: Rule, merged: Tensor, shape: ModelShape) -> list[Tensor]:
    """Undo `merge`."""
    if rule.kind is Kind.QKV:
        query_rows = shape.num_attention_heads // shape.num_query_groups * shape.head_dim
        groups = merged.reshape(shape.num_query_groups, -1, *merged.shape[1:])
        parts = groups.split([query_rows, shape.head_dim, shape.head_dim], dim=1)
        return [part.flatten(0, 1) for part in parts]
    if rule.kind is Kind.GATED:
        return list(merged.unbind(0))
    if rule.kind is Kind.VOCABULARY:
        return [merged[: shape.vocab_size]]
    return [merged]


def whole_shape(rule: Rule, local: Tensor) -> tuple[int, ...]:
    """Return the shape of the merged tensor that `local` is this rank's part of."""
    size = list(local.shape)
    if rule.kind in CUT_DIM:
        size[CUT_DIM[rule.kind]] *= cut_group(rule).size()
    return tuple(size)
