"""Causal core attention by PyTorch's SDPA, for where Transformer Engine is not installed.

Megatron's own local attention refuses packed sequences and context parallelism. This one does both,
on any device, and attends within each sequence only, so a packed run equals the unpacked runs to
rounding. It knows sliding windows and sinks, as the attention of Transformer Engine does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor

from moe_replay.errors import UnsupportedError

# Sequences share one padded SDPA call while the shortest fills this part of the longest.
_MIN_FILL_FRAC = 0.75


class SDPACoreAttention(MegatronModule):
    """Attend causally over `[s b heads d]` or packed `[t heads d]` tensors.

    Under context parallelism keys and values are gathered over Megatron's zigzag split: of `2 * cp`
    equal chunks of each sequence, rank r holds chunks r and `2 * cp - 1 - r`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_unused: Any,
    ) -> None:
        super().__init__(config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        for condition, what in (
            (dropout > 0, f"attention dropout {dropout}"),
            (config.softmax_type == "off-by-one", "softmax_type 'off-by-one'"),
            (attention_type != "self", f"{attention_type} attention"),
            (attn_mask_type is not AttnMaskType.causal, f"attention mask {attn_mask_type.name}"),
        ):
            if condition:
                raise UnsupportedError(
                    f"core attention of layer {layer_number - 1} was built with {what}; without "
                    "Transformer Engine only causal self-attention without dropout is available"
                )
        group = getattr(pg_collection, "cp", None)
        self.cp_group = parallel_state.get_context_parallel_group() if group is None else group
        self.softmax_scale = softmax_scale
        windowed = is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        )
        self.window: int | None = config.window_size[0] if windowed else None
        """Rows before its own that a row attends to; None for all."""
        # Megatron's and Transformer Engine's name for the sinks.
        self.softmax_offset: torch.nn.Parameter | None = None
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            self.softmax_offset = torch.nn.Parameter(
                torch.empty(heads, dtype=config.params_dtype, device=torch.cuda.current_device())
            )
            set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> Any:
        """Return the sinks as parts of one tensor of all heads."""
        held = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(
            held, prefix, {"softmax_offset": 0}, sharded_offsets
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_unused: Any,
    ) -> Tensor:
        """Return attended values with heads and head dim merged: `[s b heads*d]`, `[t heads*d]`."""
        if attention_mask is not None or attention_bias is not None:
            raise UnsupportedError(
                "core attention got an attention mask or bias; it is causal within each sequence and "
                "takes neither. Pass attention_mask=None and pack sequences instead of masking padding"
            )
        packed = query.dim() == 3
        num_ranks = self.cp_group.size()
        if packed:
            lengths = _packed_lengths(packed_seq_params)
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        else:
            lengths = [query.size(0) * num_ranks]
        if num_ranks > 1:
            out = self._over_context_ranks(query, key, value, lengths)
        elif packed:
            out = self._packed(
                query.squeeze(1), key.squeeze(1), value.squeeze(1), lengths
            ).unsqueeze(1)
        else:
            out = self._attend(query, key, value)
        # Packed without the batch dim, as Transformer Engine does: Megatron puts it back, after
        # cutting padded heads off.
        return out.flatten(2).squeeze(1) if packed else out.flatten(2)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Attend over `[s b heads d]`; causal from position 0 without a mask."""
        sinks = self.softmax_offset
        if mask is None and (self.window is not None or sinks is not None):
            positions = torch.arange(len(query), device=query.device)
            mask = self._visible(positions, positions)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if sinks is not None:
            assert mask is not None
            return self._with_sinks(query, key, value, mask, sinks).permute(2, 0, 1, 3)
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=query.size(1) != key.size(1),
        )
        return out.permute(2, 0, 1, 3)

    def _visible(self, rows: Tensor, others: Tensor) -> Tensor:
        """Return which of the positions ``others`` each of the positions ``rows`` attends to."""
        apart = rows[:, None] - others[None]
        return apart >= 0 if self.window is None else (apart >= 0) & (apart <= self.window)

    def _with_sinks(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, sinks: Tensor
    ) -> Tensor:
        """Attend over `[b heads s d]` with a learned score more in each head, of no value.

        Scores of 0 0 beside a sink of log 2 weigh 1/4 each.
        """
        key, value = (x.repeat_interleave(query.size(1) // x.size(1), dim=1) for x in (key, value))
        scale = query.size(-1) ** -0.5 if self.softmax_scale is None else self.softmax_scale
        scores = (query @ key.transpose(2, 3)) * scale
        column = sinks[:, None, None].to(scores.dtype).expand(*scores.shape[:3], 1)
        both = torch.cat([scores.masked_fill(~mask, -torch.inf), column], dim=-1)
        weights = both.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
        return weights[..., :-1] @ value

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
        """Attend over `[t heads d]`, sequences of like length together in one padded call.

        On one CPU thread, 128 sequences of 20-40 rows, fp32, forward and backward: 2.1 times as
        fast as one call a sequence. Padding everything to the longest is up to 90 times slower
        where one sequence is long, a block mask over the whole pack 30 times.
        """
        if len(set(lengths)) == 1:
            # Nothing to pad, and nothing to gather.
            given = (
                x.unflatten(0, (len(lengths), -1)).transpose(0, 1) for x in (query, key, value)
            )
            return self._attend(*given).transpose(0, 1).flatten(0, 1)
        starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
        outs, rows = [], []
        for bucket in length_buckets(lengths):
            index, valid = _bucket_rows([starts[i] for i in bucket], [lengths[i] for i in bucket])
            index, valid = index.to(query.device), valid.to(query.device)
            shape = (len(bucket), -1)
            # Padding repeats the sequence's last row: later than every real query, so none attends
            # to it.
            out = self._attend(
                *(
                    x.index_select(0, index).unflatten(0, shape).transpose(0, 1)
                    for x in (query, key, value)
                )
            )
            outs.append(out.transpose(0, 1).flatten(0, 1).index_select(0, valid))
            rows.append(index[valid])
        order = torch.cat(rows)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        return torch.cat(outs).index_select(0, inverse)

    def _over_context_ranks(
        self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int]
    ) -> Tensor:
        """Attend from this rank's zigzag rows to the rows of all ranks."""
        num_ranks, rank = self.cp_group.size(), self.cp_group.rank()
        key, value = (
            gather_from_sequence_parallel_region(x.contiguous(), group=self.cp_group)
            for x in (key, value)
        )
        order = _gathered_order(lengths, num_ranks).to(query.device)
        key, value = key.index_select(0, order), value.index_select(0, order)
        outs = []
        local, whole = 0, 0
        for length in lengths:
            positions = zigzag_positions(length, rank, num_ranks).to(query.device)
            mask = self._visible(positions, torch.arange(length, device=query.device))
            outs.append(
                self._attend(
                    query[local : local + positions.numel()],
                    key[whole : whole + length],
                    value[whole : whole + length],
                    mask,
                )
            )
            local, whole = local + positions.numel(), whole + length
        return torch.cat(outs)


def length_buckets(lengths: list[int]) -> list[list[int]]:
    """Group sequence numbers so that within a group no sequence is much shorter than the longest.

    Examples:
        >>> length_buckets([4, 100, 3, 90, 1])
        [[1, 3], [0, 2], [4]]
    """
    buckets: list[list[int]] = []
    for i in sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i]):
        if buckets and lengths[i] >= _MIN_FILL_FRAC * lengths[buckets[-1][0]]:
            buckets[-1].append(i)
        else:
            buckets.append([i])
    return buckets


def zigzag_positions(length: int, rank: int, num_ranks: int) -> Int[Tensor, " local_rows"]:
    """Return the positions of a sequence that a context-parallel rank holds, in its local order.

    Examples:
        >>> zigzag_positions(8, 0, 2).tolist()
        [0, 1, 6, 7]
    """
    assert length % (2 * num_ranks) == 0, f"{length} rows do not split into {2 * num_ranks} chunks"
    chunks = torch.arange(length).view(2 * num_ranks, -1)
    return torch.cat([chunks[rank], chunks[2 * num_ranks - 1 - rank]])


def _packed_lengths(packed: PackedSeqParams | None) -> list[int]:
    assert packed is not None, "a packed query comes with packed_seq_params"
    ends = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
    return torch.diff(ends).tolist()


def _bucket_rows(
    starts: list[int], lengths: list[int]
) -> tuple[Int[Tensor, " padded_rows"], Int[Tensor, " rows"]]:
    """Return the packed row of each row of a padded bucket, and which of its rows are real."""
    length = torch.tensor(lengths)[:, None]
    offset = torch.arange(max(lengths))[None]
    index = torch.tensor(starts)[:, None] + torch.minimum(offset, length - 1)
    return index.flatten(), (offset < length).flatten().nonzero().squeeze(1)


def _gathered_order(lengths: list[int], num_ranks: int) -> Int[Tensor, " rows"]:
    """Return where, in the rank-major gathered rows, the rows of the sequences lie in order.

    Sequences of 4 and 8 rows, a0..a3 and b0..b7, on 2 ranks, which hold the chunks 0, 3 and 1, 2:

        gathered rows   0  1  2  3  4  5 | 6  7  8  9  10 11
        hold            a0 a3 b0 b1 b6 b7  a1 a2 b2 b3 b4 b5
        returned        0 6 7 1 (a), 2 3 8 9 10 11 4 5 (b)
    """
    num_local = sum(lengths) // num_ranks
    order = torch.empty(sum(lengths), dtype=torch.int64)
    start = 0
    for length in lengths:
        for rank in range(num_ranks):
            positions = zigzag_positions(length, rank, num_ranks)
            first = rank * num_local + start // num_ranks
            order[start + positions] = torch.arange(first, first + positions.numel())
        start += length
    return order
