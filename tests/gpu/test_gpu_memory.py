"""Memory that the trainer gives back on a GPU: it is free for others, and comes back to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_replay.grpo.memory import DevicePeaks
from moe_replay.megatron.actor import MegatronActor
from moe_replay.routing import Routing
from moe_replay.testing.policies import mean_loss, pack, start_policy, with_own_routes
from moe_replay.testing.samples import make_samples

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SEED = 23


@pytest.fixture(scope="module")
def giver(checkpoint: Path) -> MegatronActor:
    """Return a policy in bfloat16 that gives everything back, after a step."""
    actor = start_policy(checkpoint, dtype=torch.bfloat16, gives_back="weights")
    update(actor)
    return actor


def update(actor: MegatronActor) -> None:
    print("seed", SEED)
    samples = with_own_routes(actor, make_samples(8, seed=SEED))
    actor.update(pack(samples, scorer=actor), mean_loss, temperature=1.0, routing=Routing.REPLAY)


def test_what_is_given_back_is_free_and_comes_back_to_the_bit(giver: MegatronActor) -> None:
    before = {name: value.cpu() for name, value in giver.weights.tensors()}
    torch.cuda.synchronize()
    held, allocated = giver.memory.held_bytes(), torch.cuda.memory_allocated()
    giver.memory.give_back()
    assert giver.memory.held_bytes() == 0
    assert allocated - torch.cuda.memory_allocated() >= held
    after = {name: value.cpu() for name, value in giver.weights.tensors()}
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_host_memory_is_pinned_and_made_once(giver: MegatronActor) -> None:
    def blocks() -> list[int]:
        giver.memory.give_back()
        held = giver.memory._hosts["optimizer"]._blocks
        assert all(block.is_pinned() for block in held)
        return [block.data_ptr() for block in held]

    first = blocks()
    update(giver)
    assert blocks() == first


def test_a_step_after_memory_was_given_back_is_finite(giver: MegatronActor) -> None:
    giver.memory.give_back()
    update(giver)
    assert all(torch.isfinite(value).all() for _, value in giver.weights.tensors())


def test_the_peaks_of_both_phases_are_measured(giver: MegatronActor) -> None:
    peaks = DevicePeaks.of(giver.device)
    giver.memory.give_back()
    peaks.enter("rollout", held_bytes=giver.memory.held_bytes())
    room = torch.empty(1 << 26, dtype=torch.uint8, device=giver.device)
    del room
    peaks.enter("update")
    update(giver)
    found = peaks.take()
    assert found["rollout_held_bytes"] == 0
    assert found["rollout_peak_bytes"] >= 1 << 26
    assert found["update_peak_bytes"] > 0
