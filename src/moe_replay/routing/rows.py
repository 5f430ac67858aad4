"""RowIndex: where each token of a batch goes on one rank, one gather vector for tokens and routes.

Packing or padding, context parallelism (CP), sequence parallelism (SP) and padding multiples are
composed once, here. Whatever has a value per token (ids, masks, log-probabilities, advantages,
routes) moves through the same vector, so no two of them can disagree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moe_replay.errors import TraceError

if TYPE_CHECKING:
    from jaxtyping import Int64, Shaped

PAD = -1
"""Entry of `RowIndex.rows` that holds no token."""

CpPartition = Literal["zigzag", "contiguous"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowIndex:
    """Rows of one rank, each naming the row of the concatenated batch that it holds.

    The concatenated batch is the sequences end to end, without padding. ``RowIndex.packed([3, 2],
    pad_multiple=4).rows`` is ``[0 1 2 3 4 -1 -1 -1]``.
    """

    rows: Int64[np.ndarray, " local_rows"]
    """``[local_rows]``, row of the concatenated batch, or -1 (`PAD`)."""
    num_rows: int
    """Rows of the concatenated batch, over all ranks."""
    padded_lengths: tuple[int, ...]
    """Length of each sequence with padding, before CP; their sum is the rows of all CP ranks."""
    num_side_by_side: int = 1
    """Rows that share a position: the samples of a padded batch, 1 when packed.

    No shard separates them.
    """

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
        """Lay sequences end to end; under CP pad each to a multiple of ``2 * cp_size`` and cut it.

        ``pad_multiple`` pads the *local* rows (sequence parallelism needs a multiple of the TP
        size); the padding is appended to the last sequence, whose queries it cannot disturb because
        attention is causal.

        Worked example: sequences of 7 and 3 tokens on two CP ranks under the zigzag. They are
        padded to 8 and 4, and cut into 2 * 2 chunks of 2 and 1 rows. Rank r takes the chunks r and
        3 - r, so that both see as much of the causal triangle:

            batch rows    0  1 | 2  3 | 4  5 | 6 -1      7 | 8 | 9 | -1
            rank          0      1      1      0         0   1   1   0
            rank 0 holds  0  1   6 -1   7 -1
            rank 1 holds  2  3   4  5   8  9
        """
        _check_lengths(lengths)
        _check_rank("cp", cp_rank, cp_size)
        unit = 2 * cp_size if cp_size > 1 else 1
        padded = [-(-length // unit) * unit for length in lengths]
        total_unit = int(np.lcm(pad_multiple * cp_size, unit))
        padded[-1] += -sum(padded) % total_unit
        sizes = np.array(padded, dtype=np.int64)
        # One column a chunk that this rank holds of each sequence: two under the zigzag, else one.
        held, num_chunks = _chunks_of(cp_size, cp_rank, cp_partition)
        counts = np.repeat(sizes // num_chunks, len(held))
        positions = _stretches((sizes[:, None] // num_chunks * held).ravel(), counts)
        whole = np.array(lengths, dtype=np.int64)
        starts = np.cumsum(whole) - whole
        local = np.repeat(np.arange(len(whole)), sizes // num_chunks * len(held))
        return cls(
            rows=np.where(positions < whole[local], positions + starts[local], PAD),
            num_rows=int(whole.sum()),
            padded_lengths=tuple(padded),
        )

    @classmethod
    def empty(cls, *, cp_size: int = 1, pad_multiple: int = 1) -> RowIndex:
        """Lay no sequence at all: the fewest rows that a rank can run, all of them padding.

        Two CP ranks and ``pad_multiple = 1`` give one sequence of 4 padding rows, 2 on each rank.
        """
        num_rows = math.lcm(pad_multiple * cp_size, 2 * cp_size if cp_size > 1 else 1)
        return cls(
            rows=np.full(num_rows // cp_size, PAD, dtype=np.int64),
            num_rows=0,
            padded_lengths=(num_rows,),
        )

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
        """Lay sequences in a rectangle of ``max_length`` columns, by position, then sample.

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
        held, num_chunks = _chunks_of(cp_size, cp_rank, cp_partition)
        size = max_length // num_chunks
        columns = _stretches(held * size, np.full(len(held), size))
        whole = np.array(lengths, dtype=np.int64)
        starts = np.cumsum(whole) - whole
        positions = columns[:, None] - (max_length - whole if side == "left" else 0)
        is_token = (positions >= 0) & (positions < whole)
        return cls(
            rows=np.where(is_token, positions + starts, PAD).reshape(-1),
            num_rows=int(whole.sum()),
            padded_lengths=(max_length,) * len(lengths),
            num_side_by_side=len(lengths),
        )

    def sequence_shard(self, tp_size: int, tp_rank: int) -> RowIndex:
        """Return the contiguous part that rank ``tp_rank`` holds under sequence parallelism.

        Raises:
            TraceError: when the positions do not divide by ``tp_size``.
        """
        _check_rank("tp", tp_rank, tp_size)
        positions = len(self.rows) // self.num_side_by_side
        if positions % tp_size:
            raise TraceError(
                f"{positions} local positions do not divide by tp_size {tp_size}; pack with pad_multiple={tp_size}, or pad "
                f"to a max_length that divides by cp_size x {tp_size}"
            )
        size = len(self.rows) // tp_size
        return replace(self, rows=self.rows[tp_rank * size : (tp_rank + 1) * size])

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
        if not self.num_rows:
            return np.full((len(self.rows), *values.shape[1:]), fill, dtype=values.dtype)
        local = values[np.where(self.is_token, self.rows, 0)]
        local[~self.is_token] = fill
        return local

    def scatter(
        self,
        local: Shaped[np.ndarray, "local_rows ..."],
        out: Shaped[np.ndarray, "rows ..."],
    ) -> None:
        """Write local rows to the rows of ``out`` ``[num_rows, ...]`` that they hold."""
        if len(local) != len(self.rows) or len(out) != self.num_rows:
            raise TraceError(
                f"got {len(local)} local and {len(out)} global rows, expected {len(self.rows)} and {self.num_rows}"
            )
        out[self.rows[self.is_token]] = local[self.is_token]


def _chunks_of(
    cp_size: int, cp_rank: int, partition: CpPartition
) -> tuple[Int64[np.ndarray, " held"], int]:
    """Return the chunks of each sequence that a rank holds, and how many a sequence has."""
    if partition == "contiguous" or cp_size == 1:
        return np.array([cp_rank]), cp_size
    return np.array([cp_rank, 2 * cp_size - 1 - cp_rank]), 2 * cp_size


def _stretches(
    starts: Int64[np.ndarray, " stretches"], counts: Int64[np.ndarray, " stretches"]
) -> Int64[np.ndarray, " entries"]:
    """Count up from each of ``starts``: ``[5, 0]`` and ``[2, 3]`` give ``[5, 6, 0, 1, 2]``."""
    before = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + np.repeat(starts - before, counts)


def _check_lengths(lengths: Sequence[int]) -> None:
    if not lengths or min(lengths) < 1:
        raise TraceError(
            f"expected at least one sequence length, and each at least 1, got {list(lengths)}"
        )


def _check_rank(axis: str, rank: int, size: int) -> None:
    if not 0 <= rank < size:
        raise TraceError(f"{axis}_rank {rank} lies outside 0..{size - 1} ({axis}_size {size})")
