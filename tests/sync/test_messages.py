"""JSON messages between ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from moe_replay.sync.messages import gather_json
from moe_replay.testing.ranks import run_ranks


def _gather(value_of_rank: dict[int, object]) -> list[object]:
    world = dist.group.WORLD
    assert world is not None
    return gather_json(value_of_rank[dist.get_rank()], world, device=torch.device("cpu"))


@pytest.mark.ranks
def test_gather_returns_values_of_different_length_in_rank_order() -> None:
    values = {0: {"a": [1, 2]}, 1: {"b": "a much longer value, with ünicode"}, 2: []}
    for gathered in run_ranks(_gather, 3, values):
        assert gathered == [values[0], values[1], values[2]]


@pytest.mark.ranks
def test_gather_keeps_floats_to_the_last_bit() -> None:
    values = {0: 0.1 + 0.2, 1: 1e-310}
    assert run_ranks(_gather, 2, values)[0] == [0.1 + 0.2, 1e-310]
