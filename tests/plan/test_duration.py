"""Operations behind the seconds of a step, by hand."""

from __future__ import annotations

import pytest

from moe_replay.plan.duration import Work
from moe_replay.plan.machine import read_machine
from moe_replay.plan.plan import make_plan


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # 48 layers of 32 heads: a product with keys of 128, one with values of 128.
        ("qwen3-30b-a3b", 2 * 48 * 32 * (128 + 128)),
        # 61 layers of 128 heads: keys of 128 + 64 rotated, values of 128.
        ("deepseek-v3", 2 * 61 * 128 * (192 + 128)),
    ],
)
def test_operations_of_attention(shape, name, expected):
    assert Work.of(shape(name)).attention == expected


@pytest.mark.parametrize(("transfer", "expected"), [("auto", 4), ("nccl", 1)])
def test_a_push_goes_to_every_server(recipe, transfer, expected):
    """By hand: 61.1 GB over 35 GB/s, four times unless all servers are in a group."""
    urls = [f"http://127.0.0.1:{port}" for port in range(1, 5)]
    servers = {"engine": "vllm-server", "urls": urls, "weight_transfer": transfer}
    parts = make_plan(recipe(rollout=servers), read_machine(["gpus=8x80GB"])).time.parts
    assert parts["push"] == pytest.approx(expected * 61.1 / 35, rel=0.01)
