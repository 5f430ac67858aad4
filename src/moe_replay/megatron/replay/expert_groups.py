"""Choose experts within groups as the model does, where Megatron-Core scores groups otherwise.

Megatron scores a group by the sum of its best `topk // group_topk` experts. DeepSeek-V2 scores it
by its best one, and chooses 6 experts from 3 groups, which Megatron would score by their best two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertGroups:
    """Groups of experts of which each token may use some only.

    Stands in a router's RouterReplay, and chooses for Megatron or for a replay scope.
    """

    num_groups: int
    """Equal groups, of neighbouring experts."""
    groups_per_token: int
    """Groups that a token's experts come from."""
    num_scored: int
    """A group's score is the sum of its best so many experts'."""

    def get_replay_topk(
        self, scores: torch.Tensor, topk: int, *_ignored: Any, **_unused: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores and ids of the best experts within the best groups of each row.

        With 6 experts in 3 groups, 2 groups and 2 experts a token, groups scored by their best
        expert: scores .1 .2 | .5 .0 | .3 .3 keep the last two groups, and choose experts 2 and 4.
        """
        grouped = scores.unflatten(-1, (self.num_groups, -1))
        group_scores = grouped.topk(self.num_scored, dim=-1).values.sum(dim=-1)
        chosen = group_scores.topk(self.groups_per_token, dim=-1, sorted=False).indices
        allowed = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(-1, chosen, True)
        within = grouped.masked_fill(~allowed[..., None], -torch.inf).flatten(-2)
        values, ids = within.topk(topk, dim=-1)
        return values, ids
