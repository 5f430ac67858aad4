"""Attention stays inside each sequence, packed or cut over context-parallel ranks."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from moe_replay.errors import UnsupportedError
from moe_replay.megatron.layout import ParallelLayout, initialize
from moe_replay.megatron.upstream.attention import (
    SDPACoreAttention,
    length_buckets,
    zigzag_positions,
)
from moe_replay.megatron.upstream.warnings import quiet_megatron
from moe_replay.testing.ranks import run_ranks

HEADS, GROUPS, HEAD_DIM = 4, 2, 8
# One long, several alike, one single row; multiples of 8 for two and four context ranks.
UNEVEN = [40, 3, 9, 8, 1, 10]
EVEN = [48, 8, 16, 8]


def attention(made_with: dict[str, Any] | None = None, **config: Any) -> SDPACoreAttention:
    with quiet_megatron():
        made = TransformerConfig(
            num_layers=1,
            hidden_size=32,
            num_attention_heads=HEADS,
            attention_dropout=config.pop("attention_dropout", 0.0),
            **made_with or {},
        )
    arguments = {"attn_mask_type": AttnMaskType.causal, "attention_type": "self"} | config
    return SDPACoreAttention(made, 1, **arguments)


def packed_params(lengths: list[int]) -> PackedSeqParams:
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends)


def random_qkv(lengths: list[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(sum(lengths), heads, HEAD_DIM, generator=generator, requires_grad=True)
        for heads in (HEADS, GROUPS, GROUPS)
    ]


@cache
def expected(lengths: tuple[int, ...]) -> list[torch.Tensor]:
    """Return output and gradients of one softmax attention a sequence, written out."""
    query, key, value = random_qkv(list(lengths))
    outs = []
    for q, k, v in zip(*(x.split(list(lengths)) for x in (query, key, value)), strict=True):
        k, v = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / HEAD_DIM**0.5
        future = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        outs.append(torch.einsum("hqk,khd->qhd", weights, v))
    out = torch.cat(outs).flatten(1)
    (out * torch.arange(out.numel()).view_as(out).cos()).sum().backward()
    return [out.detach(), query.grad, key.grad, value.grad]


def run_packed(lengths: list[int], context_ranks: int) -> list[torch.Tensor]:
    """Return this rank's rows of the output and of the gradients, and which rows they are."""
    initialize(ParallelLayout(context_parallel_size=context_ranks))
    rows, start = [], 0
    for length in lengths:
        held = (
            zigzag_positions(length, dist.get_rank(), context_ranks)
            if context_ranks > 1
            else torch.arange(length)
        )
        rows.append(start + held)
        start += length
    index = torch.cat(rows)
    qkv = [x.detach()[index].requires_grad_() for x in random_qkv(lengths)]
    out = attention()(*qkv, None, packed_seq_params=packed_params(lengths))
    weight = torch.arange(sum(lengths) * out.shape[1]).view(-1, out.shape[1]).cos()[index]
    (out * weight).sum().backward()
    return [index, out.detach(), *(x.grad for x in qkv)]


def assert_close_to_expected(ranks: list[list[torch.Tensor]], lengths: list[int]) -> None:
    index = torch.cat([rank[0] for rank in ranks])
    assert index.sort().values.tolist() == list(range(sum(lengths)))
    for part, want in enumerate(expected(tuple(lengths)), start=1):
        got = torch.empty_like(want)
        got[index] = torch.cat([rank[part] for rank in ranks])
        assert (got - want).abs().max() < 5e-6


@pytest.mark.parametrize("lengths", [UNEVEN, EVEN, [7], [1, 1, 1], [5, 5, 5]])
def test_packed_sequences_attend_as_if_alone(lengths):
    assert_close_to_expected(run_ranks(run_packed, 1, lengths, 1), lengths)


@pytest.mark.ranks
@pytest.mark.parametrize("context_ranks", [2, 4])
def test_context_parallel_sequences_attend_as_if_whole(context_ranks):
    assert_close_to_expected(run_ranks(run_packed, context_ranks, EVEN, context_ranks), EVEN)


def test_another_packing_of_the_same_rows_changes_the_result():
    (one,) = run_ranks(run_packed, 1, [8, 8], 1)
    (other,) = run_ranks(run_packed, 1, [7, 9], 1)
    assert (one[1] - other[1]).abs().max() > 1e-2


def run_dense(batch: int) -> torch.Tensor:
    initialize(ParallelLayout())
    qkv = [x.detach().view(batch, 8, -1, HEAD_DIM).transpose(0, 1) for x in random_qkv([8] * batch)]
    return attention()(*qkv, None).transpose(0, 1).flatten(0, 1)


def test_a_dense_batch_attends_like_the_packed_one():
    (out,) = run_ranks(run_dense, 1, 3)
    assert (out - expected((8, 8, 8))[0]).abs().max() < 5e-6


def wide_scale() -> torch.Tensor:
    initialize(ParallelLayout())
    qkv = [x.detach()[:, None] for x in random_qkv([8])]
    return attention(softmax_scale=1e-9)(*qkv, None)


def test_softmax_scale_is_honoured():
    # With hardly any scale every position averages all values up to its own.
    value = random_qkv([8])[2].detach().repeat_interleave(HEADS // GROUPS, dim=1).flatten(1)
    mean = value.cumsum(0) / torch.arange(1, 9)[:, None]
    (out,) = run_ranks(wide_scale, 1)
    assert (out.squeeze(1) - mean).abs().max() < 1e-6


def averages(made_with: dict[str, Any], context: int) -> list[float]:
    """Return what scores of 0 make of the values 1 2 4 8 in sequences of 4 and 4 rows."""
    initialize(ParallelLayout(context_parallel_size=context))
    core = attention(made_with)
    if core.softmax_offset is not None:
        core.softmax_offset.data.fill_(2.0).log_()
    rank = dist.get_rank() if context > 1 else 0
    rows = zigzag_positions(4, rank, context) if context > 1 else torch.arange(4)
    value = torch.tensor([1.0, 2.0, 4.0, 8.0])[rows].repeat(2)[:, None, None]
    query, key, value = (
        value.new_zeros(len(value), HEADS, HEAD_DIM),
        value.new_zeros(len(value), GROUPS, HEAD_DIM),
        value.expand(-1, GROUPS, HEAD_DIM),
    )
    out = core(query, key, value, None, packed_seq_params=packed_params([4, 4]))
    found = out.detach().view(2, len(rows), -1)
    assert (found[0] == found[1]).all() and (found == found[..., :1]).all()
    return found[0, :, 0].tolist()


WINDOW, SINK = {"window_size": (1, 0)}, {"softmax_type": "learnable"}


@pytest.mark.parametrize(
    ("made_with", "expected_rows"),
    [
        ({}, [1, 3 / 2, 7 / 3, 15 / 4]),
        (WINDOW, [1, 3 / 2, 6 / 2, 12 / 2]),
        # A sink of log 2 weighs as much as two more keys, without a value.
        (SINK, [1 / 3, 3 / 4, 7 / 5, 15 / 6]),
        (WINDOW | SINK, [1 / 3, 3 / 4, 6 / 4, 12 / 4]),
        (WINDOW | {"window_attn_skip_freq": [0]}, [1, 3 / 2, 7 / 3, 15 / 4]),
    ],
)
@pytest.mark.parametrize("context", [1, 2])
def test_windows_and_sinks_weigh_what_they_should(made_with, expected_rows, context):
    found = run_ranks(averages, context, made_with, context)
    if context == 1:
        assert found[0] == pytest.approx(expected_rows)
    else:
        # Of four chunks the first rank holds 0 and 3, the second 1 and 2.
        first, second = found
        assert [first[0], *second, first[1]] == pytest.approx(expected_rows)


def refused(**config: Any) -> None:
    initialize(ParallelLayout())
    attention(**config)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"attn_mask_type": AttnMaskType.no_mask}, "no_mask"),
        ({"attention_dropout": 0.1}, r"dropout 0\.1"),
        ({"attention_type": "cross"}, "cross"),
    ],
)
def test_what_it_cannot_do_is_refused(config, what):
    with pytest.raises(UnsupportedError, match=what):
        run_ranks(lambda: refused(**config), 1)


def masked() -> None:
    initialize(ParallelLayout())
    attention()(*random_qkv([8]), torch.ones(1), packed_seq_params=packed_params([8]))


def test_an_attention_mask_is_refused():
    with pytest.raises(UnsupportedError, match="mask"):
        run_ranks(masked, 1)


@given(st.lists(st.integers(0, 300), max_size=40))
def test_length_buckets_hold_every_sequence_once(lengths):
    buckets = length_buckets(lengths)
    assert sorted(i for b in buckets for i in b) == [i for i, n in enumerate(lengths) if n]
    assert all(min(lengths[i] for i in b) >= 0.75 * max(lengths[i] for i in b) for b in buckets)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_zigzag_positions_cover_a_sequence_once(num_ranks):
    held = [zigzag_positions(24, rank, num_ranks).tolist() for rank in range(num_ranks)]
    assert sorted(position for part in held for position in part) == list(range(24))


def test_zigzag_positions_pair_an_early_chunk_with_a_late_one():
    assert zigzag_positions(16, 1, 2).tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
