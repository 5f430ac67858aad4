"""Choose experts as the model does, where Megatron-Core chooses otherwise.

Megatron scores a group by the sum of its best `topk // group_topk` experts. DeepSeek-V2 scores it
by its best one, and chooses 6 experts from 3 groups, which Megatron would score by their best two.
ERNIE 4.5 moves the choice of a softmax router by a bias; Megatron refuses one there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter

BIAS_NAME = "softmax_expert_bias"
"""Name of the buffer in a router that holds the bias of `BiasedSoftmax`; of no use to Megatron."""


class OwnChoice(ABC):
    """Stands in a router's RouterReplay, and chooses for Megatron or for a replay scope."""

    @abstractmethod
    def ranking(self, scores: torch.Tensor) -> torch.Tensor:
        """Return what the choice goes by, ``[rows, experts]``: -inf for one that a row may not use.

        ``scores`` are what Megatron hands to a router's top-k.
        """

    @abstractmethod
    def get_replay_topk(
        self, scores: torch.Tensor, topk: int, *_ignored: Any, **_unused: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scores and ids of the experts of each row, ``[rows, topk]``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertGroups(OwnChoice):
    """Groups of experts of which each token may use some only."""

    num_groups: int
    """Equal groups, of neighbouring experts."""
    groups_per_token: int
    """Groups that a token's experts come from."""
    num_scored: int
    """A group's score is the sum of its best so many experts'."""

    @classmethod
    def of_megatron(cls, num_groups: int, group_topk: int, topk: int) -> ExpertGroups:
        """Return the groups of Megatron's own choice of ``topk`` experts."""
        scored = topk // group_topk
        return cls(num_groups=num_groups, groups_per_token=group_topk, num_scored=scored)

    def ranking(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores, with -inf for experts outside the best groups of each row."""
        grouped = scores.unflatten(-1, (self.num_groups, -1))
        group_scores = grouped.topk(self.num_scored, dim=-1).values.sum(dim=-1)
        chosen = group_scores.topk(self.groups_per_token, dim=-1, sorted=False).indices
        allowed = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(-1, chosen, True)
        return grouped.masked_fill(~allowed[..., None], -torch.inf).flatten(-2)

    def get_replay_topk(
        self, scores: torch.Tensor, topk: int, *_ignored: Any, **_unused: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores and ids of the best experts within the best groups of each row.

        With 6 experts in 3 groups, 2 groups and 2 experts a token, groups scored by their best
        expert: scores .1 .2 | .5 .0 | .3 .3 keep the last two groups, and choose experts 2 and 4.
        """
        values, ids = self.ranking(scores).topk(topk, dim=-1)
        return values, ids


class BiasedSoftmax(OwnChoice):
    """A softmax router whose bias moves the choice, never the weights."""

    def __init__(self, router: TopKRouter) -> None:
        """Choose by the buffer `BIAS_NAME` of ``router``, which is put there as zeros."""
        bias = torch.zeros(
            router.config.num_moe_experts, dtype=torch.float32, device=torch.cuda.current_device()
        )
        router.register_buffer(BIAS_NAME, bias)
        self._router = router

    def ranking(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the sums of probability and bias of the logits ``scores``."""
        return scores.float().softmax(dim=-1) + getattr(self._router, BIAS_NAME)

    def get_replay_topk(
        self, scores: torch.Tensor, topk: int, *_ignored: Any, **_unused: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits and ids of the experts with the largest sums of probability and bias.

        Megatron then takes the softmax over the logits of the chosen, which are their shares of the
        sum of their probabilities. Logits 0 0 with a bias of 0 .1 choose expert 1.
        """
        with torch.no_grad():
            ids = self.ranking(scores).topk(topk, dim=-1).indices
        return scores.gather(1, ids), ids
