"""What is said behind --plan becomes a machine, or a refusal that says what was expected."""

from __future__ import annotations

import pytest

from moe_replay.errors import RecipeError
from moe_replay.plan.machine import read_machine


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("gpus=8x80GB", (1, 8, 80.0, "8 x 80 GB")),
        ("gpus=4x40GB", (1, 4, 40.0, "4 x 40 GB")),
        ("gpus=64x80GB", (8, 8, 80.0, "64 x 80 GB in 8 nodes")),
        ("nodes=2x8x80GB", (2, 8, 80.0, "16 x 80 GB in 2 nodes")),
        ("nodes=2x4x96.5GB", (2, 4, 96.5, "8 x 96.5 GB in 2 nodes")),
    ],
)
def test_gpus_and_nodes_are_read(word, expected):
    machine = read_machine([word])
    found = (machine.num_nodes, machine.gpus_per_node, machine.gpu_gb, machine.describe())
    assert found == expected


def test_a_plan_fills_95_percent_of_a_card():
    assert read_machine(["gpus=8x80GB"]).usable_bytes == 76e9


def test_servers_and_rates_are_read():
    machine = read_machine(["gpus=8x80GB", "servers=16x141GB", "network_gb_s=12.5"])
    assert machine.servers is not None
    assert (machine.servers.num_gpus, machine.servers.gpu_gb) == (16, 141.0)
    assert machine.rates.network_gb_s == 12.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["8x80GB"], "got '8x80GB', expected NAME=VALUE"),
        (["gpus=8x80"], "gpus=8x80, expected a form like gpus=8x80GB"),
        (["gpus=2x8x80GB"], "expected a form like gpus=8x80GB"),
        (["nodes=8x80GB"], "expected a form like nodes=2x8x80GB"),
        (["gpus=0x80GB"], "expected numbers above 0"),
        (["gpus=12x80GB"], "not a number of full nodes of 8 GPUs"),
        (["gpus=8x80GB", "nodes=1x8x80GB"], "expected exactly one of"),
        (["gpus=8x80GB", "gpus=8x80GB"], "each name once"),
        (["tflops=400"], "expected exactly one of"),
        (["gpus=8x80GB", "flops=400"], "got flops, expected gpus, nodes, servers, or one of"),
        (["gpus=8x80GB", "tflops=fast"], "tflops=fast, expected a number above 0"),
        (["gpus=8x80GB", "hbm_frac=1.5"], "hbm_frac=1.5, expected a number above 0 and at most 1"),
        (["gpus=8x80GB", "tflops=nan"], "expected a number above 0"),
    ],
)
def test_anything_else_is_refused(words, message):
    with pytest.raises(RecipeError, match="--plan") as caught:
        read_machine(words)
    assert message in str(caught.value)
