"""The rank harness returns what ranks return, and says what went wrong on which of them."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from moe_replay.testing.ranks import RankFailure, run_ranks

pytestmark = pytest.mark.ranks


def summed() -> tuple[int, float]:
    total = torch.tensor(dist.get_rank() + 1.0)
    dist.all_reduce(total)
    return dist.get_rank(), float(total)


def test_results_come_in_rank_order():
    assert run_ranks(summed, 3) == [(0, 6.0), (1, 6.0), (2, 6.0)]


def test_the_parent_has_no_process_group():
    run_ranks(summed, 1)
    assert not dist.is_initialized()


def fail_on_one() -> None:
    if dist.get_rank() == 1:
        raise KeyError("lost")
    dist.barrier()


def test_the_exception_of_a_rank_is_raised_with_its_traceback():
    with pytest.raises(KeyError, match="lost") as caught:
        run_ranks(fail_on_one, 2)
    (note,) = caught.value.__notes__
    assert note.startswith("raised on rank 1")
    assert "fail_on_one" in note


def test_a_rank_that_dies_is_named_with_its_exit_code():
    with pytest.raises(RankFailure, match="rank 0 died with exit code 3"):
        run_ranks(lambda: os._exit(3), 1)


def wait_alone() -> None:
    if dist.get_rank() == 0:
        dist.barrier()


def test_a_rank_that_hangs_is_named_with_its_stack():
    with pytest.raises(TimeoutError, match=r"(?s)ranks \[0\] of 2 still ran.*in wait_alone"):
        run_ranks(wait_alone, 2, timeout_s=15)


def test_a_result_that_cannot_be_pickled_is_an_error():
    with pytest.raises(RankFailure, match="returned a generator"):
        run_ranks(lambda: (i for i in range(3)), 1)
