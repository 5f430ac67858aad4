"""A server with a few wrong answers is found after a bounded number; drift accuses none."""

import numpy as np
import pytest

from moe_replay.routing.guard.sums import ServerSums
from moe_replay.routing.guard.verdict import Owner

ALPHA = 1e-4
SERVERS = 8
STEP = 64  # answers


def named_after(seed: int, *, wrong: float, clean: float, steps: int) -> tuple[str, int] | None:
    """Return the server that is named, and after how many of its own answers."""
    rng = np.random.default_rng(seed)
    owners = {s: Owner(server=f"server {s % SERVERS}") for s in range(STEP)}
    rates = np.array([clean + (wrong if s % SERVERS == 3 else 0.0) for s in range(STEP)])
    sums = ServerSums()
    for step in range(steps):
        sums = sums.after(np.arange(STEP), rng.random(STEP) < rates, owners)
        for fault in sums.faults(ALPHA):
            return fault.name, (step + 1) * STEP // SERVERS
    return None


@pytest.mark.parametrize(("wrong", "answers"), [(0.02, 1200), (0.03, 800), (0.1, 200), (1.0, 8)])
def test_a_server_is_named_within_a_bounded_number_of_answers(wrong, answers):
    print("seeds 0..7")
    for seed in range(8):
        found = named_after(seed, wrong=wrong, clean=2e-4, steps=answers * SERVERS // STEP)
        assert found is not None and found[0] == "server 3"


@pytest.mark.parametrize("clean", [0.0, 2e-4, 0.01, 0.3])
def test_control_signs_that_hit_all_servers_alike_name_nobody(clean):
    print("seeds 0..3")
    for seed in range(4):
        assert named_after(seed, wrong=0.0, clean=clean, steps=300) is None


def test_one_server_alone_is_compared_with_nobody():
    owners = {0: Owner(server="only")}
    sums = ServerSums()
    for _ in range(200):
        sums = sums.after(np.arange(1), np.array([True]), owners)
    assert list(sums.faults(ALPHA)) == []


def test_sums_read_back_go_on_alike():
    owners = {s: Owner(server=f"server {s}") for s in range(2)}
    sums = ServerSums().after(np.arange(2), np.array([True, False]), owners)
    again = ServerSums.from_plain(sums.to_plain())
    signs = np.array([True, False])
    assert (
        again.after(np.arange(2), signs, owners).to_plain()
        == sums.after(np.arange(2), signs, owners).to_plain()
    )
    assert sums.to_plain()["server 0"]["sum"] > sums.to_plain()["server 1"]["sum"]


def test_an_answer_of_several_servers_counts_for_each():
    owners = {0: Owner(server="a and c"), 1: Owner(server="b"), 2: Owner()}
    plain = ServerSums().after(np.arange(3), np.array([True, False, True]), owners).to_plain()
    counted = {name: (entry["answers"], entry["signs"]) for name, entry in plain.items()}
    assert counted == {"a": (1, 1), "c": (1, 1), "b": (1, 0)}
