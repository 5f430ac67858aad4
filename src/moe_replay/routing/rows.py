"""RowIndex: where every token of a batch goes on one rank, as one gather vector for tokens and routes alike.

Packing or padding, context parallelism (CP), sequence parallelism (SP) and padding multiples are composed once, here.
Whatever has a value per token (ids, masks, log-probabilities, advantages, routes) moves through the same vector,
so no two of them can disagree.

In: sequence lengths and a rank's coordinates. Out: gather vectors. Called by: batch, megatron.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64, Shaped

from moe_replay.errors import TraceError

PAD = -1
"""Entry of `RowIndex.rows` that holds no token."""

CpPartition = Literal["zigzag", "contiguous"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowIndex:
    """Rows of one rank, each naming the row of the concatenated batch that it holds.

    The concatenated batch is the sequences end to end, without padding. ``RowIndex.packed([3, 2], pad_multiple=4).rows``
    is ``[0 1 2 3 4 -1 -1 -1]``.
    """

    rows: Int64[np.ndarray, " local_rows"]
    """``[local_rows]``, row of the concatenated batch, or -1 (`PAD`)."""
    num_rows: int
    """Rows of the concatenated batch, over all ranks."""
    padded_lengths: tuple[int, ...]
    """Packed form: length of each sequence with its padding, before CP; their sum is the rows of all CP ranks."""

    @classmethod
    def packed(
        cls,
        lengths: Sequence[int],
        *,
        cp_size: int = 1,
        cp_rank: int = 0,
        cp_partition: CpPartition = "zigzag",
        pad_multiple: int = 1,
    ) -> RowIndex:
        """Lay sequences end to end; under CP pad each to ``2 * cp_size`` and cut it.

        ``pad_multiple`` pads the *local* rows (sequence parallelism needs a multiple of the TP size); the padding is
        appended to the last sequence, whose queries it cannot disturb because attention is causal.
        """
        _check_lengths(lengths)
        _check_rank("cp", cp_rank, cp_size)
        unit = 2 * cp_size if cp_size > 1 else 1
        padded = [-(-length // unit) * unit for length in lengths]
        total_unit = _common_multiple(pad_multiple * cp_size, unit)
        padded[-1] += -sum(padded) % total_unit
        pieces = []
        start = 0
        for length, size in zip(lengths, padded, strict=True):
            whole = np.full(size, PAD, dtype=np.int64)
            whole[:length] = np.arange(start, start + length)
            pieces.append(_cut_for_cp(whole, cp_size, cp_rank, cp_partition))
            start += length
        return cls(rows=np.concatenate(pieces), num_rows=start, padded_lengths=tuple(padded))

    @classmethod
    def padded(
        cls,
        lengths: Sequence[int],
        *,
        max_length: int,
        side: Literal["left", "right"] = "right",
        cp_size: int = 1,
        cp_rank: int = 0,
        cp_partition: CpPartition = "zigzag",
    ) -> RowIndex:
        """Lay sequences in a rectangle of ``max_length`` columns, flattened sequence-major (position, then sample).

        Sequence-major is Megatron's order: with two samples, local row 1 is position 0 of sample 1.
        """
        _check_lengths(lengths)
        _check_rank("cp", cp_rank, cp_size)
        unit = 2 * cp_size if cp_size > 1 else 1
        if max_length % unit or max(lengths) > max_length:
            raise TraceError(
                f"max_length {max_length} must be a multiple of {unit} (2 x cp_size) and at least the longest "
                f"sequence, {max(lengths)}"
            )
        grid = np.full((len(lengths), max_length), PAD, dtype=np.int64)
        start = 0
        for sample, length in enumerate(lengths):
            column = max_length - length if side == "left" else 0
            grid[sample, column : column + length] = np.arange(start, start + length)
            start += length
        local = _cut_for_cp(grid.T, cp_size, cp_rank, cp_partition)
        return cls(
            rows=np.ascontiguousarray(local).reshape(-1),
            num_rows=start,
            padded_lengths=(max_length,) * len(lengths),
        )

    def sequence_shard(self, tp_size: int, tp_rank: int) -> RowIndex:
        """Return the contiguous part that rank ``tp_rank`` holds under sequence parallelism.

        Raises:
            TraceError: when the rows do not divide by ``tp_size``; pass ``pad_multiple=tp_size`` when packing.
        """
        _check_rank("tp", tp_rank, tp_size)
        if len(self.rows) % tp_size:
            raise TraceError(
                f"{len(self.rows)} local rows do not divide by tp_size {tp_size}; pack with pad_multiple={tp_size}"
            )
        size = len(self.rows) // tp_size
        return RowIndex(
            rows=self.rows[tp_rank * size : (tp_rank + 1) * size],
            num_rows=self.num_rows,
            padded_lengths=self.padded_lengths,
        )

    @property
    def is_token(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """``[local_rows]``, True where the row holds a token, False at padding."""
        return self.rows >= 0

    def gather(
        self, values: Shaped[np.ndarray, "rows ..."], *, fill: float | bool
    ) -> Shaped[np.ndarray, "local_rows ..."]:
        """Return the local rows of ``values`` ``[num_rows, ...]``, with ``fill`` at padding."""
        if len(values) != self.num_rows:
            raise TraceError(
                f"values have {len(values)} rows, the concatenated batch has {self.num_rows}; "
                "they belong to another batch, or were padded before"
            )
        local = values[np.where(self.is_token, self.rows, 0)]
        local[~self.is_token] = fill
        return local

    def scatter(
        self,
        local: Shaped[np.ndarray, "local_rows ..."],
        out: Shaped[np.ndarray, "rows ..."],
    ) -> None:
        """Write local rows to their places in ``out`` ``[num_rows, ...]``; padding is left out."""
        if len(local) != len(self.rows) or len(out) != self.num_rows:
            raise TraceError(
                f"got {len(local)} local and {len(out)} global rows, expected {len(self.rows)} and {self.num_rows}"
            )
        out[self.rows[self.is_token]] = local[self.is_token]


def _cut_for_cp(
    whole: Int64[np.ndarray, "length ..."], cp_size: int, cp_rank: int, partition: CpPartition
) -> Int64[np.ndarray, "local ..."]:
    if cp_size == 1:
        return whole
    if partition == "contiguous":
        return np.split(whole, cp_size)[cp_rank]
    chunks = np.split(whole, 2 * cp_size)
    return np.concatenate([chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]])


def _common_multiple(a: int, b: int) -> int:
    return int(np.lcm(a, b))


def _check_lengths(lengths: Sequence[int]) -> None:
    if not lengths or min(lengths) < 1:
        raise TraceError(
            f"sequence lengths must be at least 1 and there must be one, got {list(lengths)}"
        )


def _check_rank(axis: str, rank: int, size: int) -> None:
    if not 0 <= rank < size:
        raise TraceError(f"{axis}_rank {rank} lies outside 0..{size - 1} ({axis}_size {size})")
