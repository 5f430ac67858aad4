"""Ranks wait for each other between hosts, for as long as the recipe says; devices give up sooner.

On a CPU the groups that Megatron makes stand for those of devices, with a limit of their own.
"""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout, _world

from moe_replay.errors import RankError
from moe_replay.megatron.actor import MegatronActor
from moe_replay.megatron.ranks.messages import HostGroup, all_ranks, wait_at_most
from moe_replay.megatron.ranks.pace import in_step
from moe_replay.routing import Routing
from moe_replay.testing.layouts import CASES
from moe_replay.testing.policies import pack, start_policy
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.samples import make_samples

pytestmark = pytest.mark.ranks
# Where ranks are to lose each other, and where nothing but the wait for the slow one may be long.
LIMIT_S, SLOW_S = 2.0, 5.0
PATIENT_S, SLOWER_S = 25.0, 30.0
GAVE_UP = "[Tt]imed out"


def limit_devices(seconds: float) -> None:
    """Give every group but that of all ranks, which hosts talk over, another limit."""
    for group in list(_world.pg_map):
        if group is not dist.group.WORLD:
            _set_pg_timeout(timedelta(seconds=seconds), group)


def limited_policy(checkpoint: Path, case: str, limit_s: float) -> MegatronActor:
    actor = start_policy(checkpoint, CASES[case].layout)
    limit_devices(limit_s)
    return actor


def slow_host_work() -> None:
    if dist.get_rank() == 1:
        threading.Event().wait(SLOWER_S)


def score_after(checkpoint: Path, meets: bool) -> int:
    """Score after a rollout that takes one rank longer than a device waits."""
    actor = limited_policy(checkpoint, "ep2", PATIENT_S if meets else LIMIT_S)
    batches = pack(make_samples(4, seed=1), scorer=actor)
    slow_host_work()
    if meets:
        all_ranks().barrier()
    return len(actor.score(batches, temperature=1.0, routing=Routing.LIVE).samples)


def test_a_pass_after_a_slow_rollout_waits_between_hosts(checkpoint: Path) -> None:
    assert run_ranks(score_after, 2, checkpoint, True) == [4, 4]


def test_without_that_wait_the_device_gives_up(checkpoint: Path) -> None:
    with pytest.raises(RuntimeError, match=GAVE_UP):
        run_ranks(score_after, 2, checkpoint, False)


def export_slowly(checkpoint: Path, every_bytes: int, limit_s: float) -> int:
    """Gather all weights while one rank takes longer over one of them than a device waits."""
    actor = limited_policy(checkpoint, "tp2", limit_s)
    count = 0
    for _ in in_step(actor.weights.tensors(), all_ranks(), every_bytes=every_bytes):
        count += 1
        if count == 5:
            slow_host_work()
    return count


def test_an_export_keeps_ranks_in_step_with_the_one_that_writes(checkpoint: Path) -> None:
    first, second = run_ranks(export_slowly, 2, checkpoint, 1, PATIENT_S)
    assert first == second > 5


def test_ranks_out_of_step_lose_each_other(checkpoint: Path) -> None:
    with pytest.raises(RuntimeError, match=GAVE_UP):
        run_ranks(export_slowly, 2, checkpoint, 1 << 40, LIMIT_S)


def meets(every_bytes: int) -> int:
    """Return how often ranks meet in a stream of six tensors of 8 bytes."""
    met: list[HostGroup] = []

    class Counting(HostGroup):
        def barrier(self) -> None:
            met.append(self)

    stream = iter([(str(n), torch.zeros(2)) for n in range(6)])
    names = [n for n, _ in in_step(stream, Counting(group=None, name="r"), every_bytes=every_bytes)]
    assert names == list("012345")
    return len(met)


@pytest.mark.parametrize(("every_bytes", "expected"), [(1, 6), (8, 6), (9, 3), (24, 2), (49, 0)])
def test_ranks_meet_whenever_so_many_bytes_have_passed(every_bytes: int, expected: int) -> None:
    assert meets(every_bytes) == expected


def limits_of_groups() -> list[float]:
    wait_at_most(timedelta(seconds=90))
    pair = HostGroup.own_part([[0], [1, 2]], name="part")
    return [all_ranks().wait_limit.total_seconds(), pair.wait_limit.total_seconds()]


def test_the_limit_holds_for_all_ranks_and_for_groups_of_them() -> None:
    alone, *others = run_ranks(limits_of_groups, 3)
    assert alone == [90.0, 24 * 3600.0]
    assert others == [[90.0, 90.0]] * 2


def lose() -> str:
    """Return what rank 0 is told about a rank 1 that does not come."""
    wait_at_most(timedelta(seconds=LIMIT_S))
    if dist.get_rank() == 1:
        threading.Event().wait(SLOW_S)
        return ""
    with pytest.raises(RankError) as lost:
        all_ranks().gather("here")
    return str(lost.value)


def test_a_rank_that_hangs_is_waited_for_as_long_as_the_recipe_says() -> None:
    message, _ = run_ranks(lose, 2)
    assert "one of them was silent for 0:00:02" in message
    assert "run.rank_timeout" in message
