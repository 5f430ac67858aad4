"""What a router would choose by itself for the rows of one call, and by what.

In: the scores that Megatron hands to a router's top-k. Out: LiveChoice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64

from moe_replay.megatron.replay.expert_groups import ExpertGroups, OwnChoice

Chosen = tuple[Float[torch.Tensor, "rows topk"], Int64[torch.Tensor, "rows topk"]]
"""Scores and ids of the experts of each row."""


class LiveChoice:
    """The choice of Megatron's top-k, or of the `OwnChoice` that stands in its place."""

    def __init__(
        self,
        scores: Float[torch.Tensor, "rows experts"],
        topk: int,
        *,
        num_groups: int | None,
        group_topk: int | None,
        compute_topk: Callable[..., Chosen],
        own: OwnChoice | None,
    ) -> None:
        self._scores, self._topk, self._own = scores, topk, own
        self._num_groups, self._group_topk = num_groups, group_topk
        self._compute_topk = compute_topk

    def __call__(self, rows: Int64[torch.Tensor, " some"] | None) -> Chosen:
        """Return the choice for some of the rows (None: all)."""
        scores, topk = self._scores, self._topk
        if self._own is not None:
            return self._own.get_replay_topk(scores if rows is None else scores[rows], topk)
        if rows is None or self._num_groups:
            # Megatron's group-limited choice counts on seeing every row of the microbatch.
            values, ids = self._compute_topk(
                scores, topk, num_groups=self._num_groups, group_topk=self._group_topk
            )
            return (values, ids) if rows is None else (values[rows], ids[rows])
        return self._compute_topk(scores[rows], topk, num_groups=None, group_topk=None)

    def margins(self, ids: Int64[torch.Tensor, "rows topk"]) -> Float[torch.Tensor, " rows"]:
        """Return by how much the last of the experts ``ids`` ranks above the first left out.

        In the units of what the choice goes by. Where groups limit it, the first left out is of an
        allowed group; inf where all of those are chosen.
        """
        with torch.no_grad():
            ranking = self._ranking()
            left_out = ranking.scatter(1, ids, -torch.inf).amax(dim=1)
            return ranking.gather(1, ids).amin(dim=1) - left_out

    def _ranking(self) -> Float[torch.Tensor, "rows experts"]:
        if self._own is not None:
            return self._own.ranking(self._scores)
        if not self._num_groups or not self._group_topk:
            return self._scores
        groups = ExpertGroups.of_megatron(self._num_groups, self._group_topk, self._topk)
        return groups.ranking(self._scores)
