"""Choose experts within groups as the model does, where Megatron-Core scores groups otherwise.

Megatron scores a group by the sum of its best `topk // group_topk` experts. DeepSeek-V2 scores it
by its best one, and chooses 6 experts from 3 groups, which Megatron would score by their best two.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter

from moe_replay.megatron.families.family import ExpertGroups


class GroupedChoice:
    """Chooses within groups, in the router's RouterReplay, for Megatron or for a replay scope."""

    def __init__(self, groups: ExpertGroups) -> None:
        self._groups = groups

    def get_replay_topk(
        self, scores: torch.Tensor, topk: int, *_ignored: Any, **_unused: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores and ids of the best experts within the best groups of each row.

        With 6 experts in 3 groups, 2 groups and 2 experts a token, groups scored by their best
        expert: scores .1 .2 | .5 .0 | .3 .3 keep the last two groups, and choose experts 2 and 4.
        """
        groups = self._groups
        grouped = scores.unflatten(-1, (groups.num_groups, -1))
        group_scores = grouped.topk(groups.num_scored, dim=-1).values.sum(dim=-1)
        chosen = group_scores.topk(groups.groups_per_token, dim=-1, sorted=False).indices
        allowed = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(-1, chosen, True)
        within = grouped.masked_fill(~allowed[..., None], -torch.inf).flatten(-2)
        values, ids = within.topk(topk, dim=-1)
        return values, ids


def choose_within_groups(routers: Iterable[TopKRouter], groups: ExpertGroups) -> None:
    """Have these routers, and no other of the process, choose within ``groups``."""
    for router in routers:
        router.router_replay = GroupedChoice(groups)
