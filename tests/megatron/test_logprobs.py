"""Entropies and log-probabilities of logits that hold extreme values."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from moe_replay.megatron.logprobs import token_entropies
from moe_replay.testing.ranks import run_ranks


def _entropies(logits: list[list[float]]) -> list[float]:
    group = dist.group.WORLD
    assert group is not None
    return token_entropies(torch.tensor(logits), temperature=1.0, tp_group=group).tolist()


@pytest.mark.ranks
def test_t12_a_masked_logit_adds_nothing_to_the_entropy() -> None:
    ln2 = math.log(2.0)
    rows = [[0.0, 0.0, -math.inf], [5.0, -math.inf, -math.inf], [3e4, 3e4, -3e4]]
    assert run_ranks(_entropies, 1, rows)[0] == pytest.approx([ln2, 0.0, ln2])
