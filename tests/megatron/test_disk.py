"""A write that fails on one rank is explained, and raised on all of them."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch.distributed as dist

from moe_replay.errors import CheckpointError
from moe_replay.megatron.disk import SharedWrite, explain
from moe_replay.testing.ranks import run_ranks


def over(cause: OSError) -> RuntimeError:
    """Return what torch's zip writer makes of a system error."""
    try:
        try:
            raise cause
        except OSError:
            raise RuntimeError("[enforce fail at inline_container.cc:672]")  # noqa: B904 (as torch does)
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the quota is used up"),
        (errno.EFBIG, "the disk is full"),
        (errno.EIO, "the disk refused"),
    ],
)
def test_r5_the_system_error_behind_an_exception_is_told(
    number: int, told: str, tmp_path: Path
) -> None:
    for error in (OSError(number, "cause"), over(OSError(number, "cause"))):
        said = explain(tmp_path / "a" / "b", error)
        assert told in said
        assert "inline_container" not in said


def test_r5_another_failure_keeps_its_own_words(tmp_path: Path) -> None:
    assert explain(tmp_path, RuntimeError("a bug")) == "RuntimeError: a bug"
    full = RuntimeError("I/O error: No space left on device (os error 28)")
    assert "the disk is full" in explain(tmp_path, full)


@pytest.mark.ranks
def test_r5_what_fails_on_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    def write() -> str:
        shared = SharedWrite(tmp_path / "step-000001")
        with shared.part():
            if dist.get_rank() == 1:
                raise OSError(errno.ENOSPC, "No space left on device")
        with pytest.raises(CheckpointError) as caught:
            shared.finish()
        fine = SharedWrite(tmp_path)
        with fine.part():
            pass
        fine.finish()
        return str(caught.value)

    for said in run_ranks(write, 2):
        assert "step-000001 failed on rank 1: No space left on device: the disk is full" in said
