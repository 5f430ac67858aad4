"""One gloo device for all groups of a process."""

from __future__ import annotations

from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from moe_replay.megatron.upstream.gloo import one_gloo_device
from moe_replay.testing.ranks import run_ranks

LIMIT = timedelta(seconds=77)


def _num_loops() -> int:
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return names.count("gloo_tcp_loop")


def _sums_of_groups(shares: bool) -> tuple[int, list[float], list[timedelta], bool]:
    """Return the loops of five more groups, sums over all of them at once, and their limits."""
    before, stock = _num_loops(), distributed_c10d.ProcessGroupGloo
    groups: list[Any] = []
    with one_gloo_device() if shares else nullcontext():
        groups += [dist.new_group([0, 1], timeout=LIMIT) for _ in range(5)]
        # A group from before is one over gloo still; torch would warn otherwise.
        distributed_c10d._set_pg_timeout(timedelta(seconds=99), dist.group.WORLD)
    values = [torch.full((1000,), float(10 * n + dist.get_rank())) for n in range(5)]
    pending = [
        dist.all_reduce(value, group=group, async_op=True)
        for value, group in zip(values, groups, strict=True)
    ]
    for work in pending:
        assert work is not None
        work.wait()
    limits = [group._get_backend(torch.device("cpu")).options._timeout for group in groups]
    is_back = distributed_c10d.ProcessGroupGloo is stock
    return _num_loops() - before, [float(value.sum()) for value in values], limits, is_back


@pytest.mark.ranks
def test_groups_share_a_loop_and_their_sums_stay_apart() -> None:
    for loops, sums, limits, is_back in run_ranks(_sums_of_groups, 2, True):
        assert loops == 1
        # 1000 values of (10 n) + (10 n + 1).
        assert sums == [1000.0, 21000.0, 41000.0, 61000.0, 81000.0]
        assert limits == [LIMIT] * 5
        assert is_back


@pytest.mark.ranks
def test_groups_of_torch_have_a_loop_each() -> None:
    assert [loops for loops, *_ in run_ranks(_sums_of_groups, 2, False)] == [5, 5]
