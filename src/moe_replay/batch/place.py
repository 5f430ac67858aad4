"""RankPlace: which part of each sequence a rank holds, and which rows follow from that.

In: tensor- and context-parallel coordinates. Out: RankPlace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moe_replay.routing import RowIndex


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlace:
    """Coordinates of a rank on the axes that cut rows."""

    tp_size: int = 1
    """Tensor-parallel ranks; above 1 the routers see one sequence-parallel part of the rows."""
    tp_rank: int = 0
    """From 0."""
    cp_size: int = 1
    """Context-parallel ranks; each holds a zigzag part of every sequence."""
    cp_rank: int = 0
    """From 0."""

    def row_index(self, lengths: Sequence[int], *, row_multiple: int = 1) -> RowIndex:
        """Return the rows of packed sequences that this rank feeds, padded to ``row_multiple``.

        Without a sequence they are padding, as few as the layout takes.
        """
        if not lengths:
            return RowIndex.empty(
                cp_size=self.cp_size, pad_multiple=math.lcm(self.tp_size, row_multiple)
            )
        return RowIndex.packed(
            lengths,
            cp_size=self.cp_size,
            cp_rank=self.cp_rank,
            pad_multiple=math.lcm(self.tp_size, row_multiple),
        )

    def router_rows(self, num_rows: int) -> slice:
        """Return which of ``num_rows`` fed rows its routers see: one of ``tp_size`` equal parts."""
        size = num_rows // self.tp_size
        return slice(self.tp_rank * size, (self.tp_rank + 1) * size)

    def router_index(self, lengths: Sequence[int], *, row_multiple: int = 1) -> RowIndex:
        """Return the rows of packed sequences that this rank's routers see."""
        index = self.row_index(lengths, row_multiple=row_multiple)
        return index.sequence_shard(self.tp_size, self.tp_rank)
