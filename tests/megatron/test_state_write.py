"""A checkpoint is what the model was when it began, whatever happens while it is written."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_replay.errors import CheckpointError
from moe_replay.megatron.actor import MegatronActor
from moe_replay.megatron.checkpoint import CheckpointFolder, RunPosition
from moe_replay.megatron.room import check_room, disk_bytes, expected_bytes
from moe_replay.megatron.state_write import _OwnFiles
from moe_replay.testing.layouts import CASES
from moe_replay.testing.policies import start_policy
from moe_replay.testing.ranks import run_ranks

from .test_offload import update

pytestmark = pytest.mark.ranks


def at(actor: MegatronActor, step: int) -> RunPosition:
    scheduler = actor.scheduler.state_dict()
    return RunPosition(
        step=step, policy_version=step, next_prompt=0, identity={}, scheduler=scheduler
    )


def weights(actor: MegatronActor) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in actor.weights.tensors()}


def written_while_training(checkpoint: Path, path: Path) -> tuple[bool, bool]:
    """Begin a checkpoint, take a step, then write it.

    Return whether what loads has the weights from before the step, and goes on as they did.
    """
    actor = start_policy(checkpoint, CASES["dp2"].layout)
    update(actor)
    before = weights(actor)
    folder = CheckpointFolder(path, save_total_limit=2)
    pending = folder.begin(actor, at(actor, 1))
    pending.state.copy()
    update(actor)
    after = weights(actor)
    pending.state.write()
    assert folder.steps() == []
    folder.finish(pending)
    assert folder.steps() == [1]
    folder.load(actor, 1)
    loaded = weights(actor)
    update(actor)
    again = weights(actor)
    return (
        all(loaded[name].equal(value) for name, value in before.items()),
        all(again[name].equal(value) for name, value in after.items()),
    )


def test_a_copy_is_written_whatever_training_does(checkpoint: Path, tmp_path: Path) -> None:
    assert run_ranks(written_while_training, 2, checkpoint, tmp_path) == [(True, True)] * 2


@pytest.mark.parametrize("copies", [True, False])
def test_what_is_not_copied_changes_with_the_model(copies: bool) -> None:
    """Megatron itself copies on a CPU what is a part of a buffer, and nothing on a GPU."""
    weight = torch.arange(3.0)
    writer = SimpleNamespace(write_buckets=[("file", "key", ([], [("item", weight)]))])
    files = _OwnFiles(writer)
    if copies:
        files.copy()
    weight.zero_()
    ((_, _, (_, ((_, written),))),) = writer.write_buckets
    assert written.tolist() == ([0.0, 1.0, 2.0] if copies else [0.0, 0.0, 0.0])


def written_in_a_thread(checkpoint: Path, path: Path, fails_on: int) -> Any:
    actor = start_policy(checkpoint, CASES["ep2"].layout)
    rank = torch.distributed.get_rank()
    update(actor)
    folder = CheckpointFolder(path, save_total_limit=2)
    folder.save(actor, at(actor, 1))
    pending = folder.begin(actor, at(actor, 2))
    if rank == fails_on:
        # A folder of the same name that cannot be written in.
        pending.state._files._writer.write_buckets = [
            (path / "gone" / Path(file).name, key, parts)
            for file, key, parts in pending.state._files._writer.write_buckets
        ]
    pending.start()
    update(actor)
    pending.wait()
    assert pending.is_written
    try:
        folder.finish(pending)
    except CheckpointError as error:
        return str(error), folder.steps(), list(path.glob("unfinished-*"))
    return "", folder.steps(), list(path.glob("unfinished-*"))


def test_a_thread_writes_it_and_it_becomes_visible(checkpoint: Path, tmp_path: Path) -> None:
    assert run_ranks(written_in_a_thread, 2, checkpoint, tmp_path, -1) == [("", [1, 2], [])] * 2


def test_a_thread_that_fails_on_one_rank_fails_on_all(checkpoint: Path, tmp_path: Path) -> None:
    told = run_ranks(written_in_a_thread, 2, checkpoint, tmp_path, 1)
    for message, steps, _ in told:
        assert "failed on rank 1: No such file or directory" in message
        assert "step 1 is the newest whole checkpoint" in message
        assert steps == [1]
    # The first rank removes it.
    assert told[0][2] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_first_checkpoint_takes_what_is_expected(
    checkpoint: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    def saved() -> tuple[int, int]:
        actor = start_policy(checkpoint, CASES["dp2"].layout, dtype=dtype)
        update(actor)
        CheckpointFolder(tmp_path, save_total_limit=1).save(actor, at(actor, 1))
        return expected_bytes(actor.modules, actor.optimizer), disk_bytes(tmp_path / "step-000001")

    expected, found = run_ranks(saved, 2)[0]
    # Beside the tensors: names and layouts of a thousand tiny ones, and whole blocks of the disk.
    # Moments that were forgotten would be 4 MB.
    assert expected < found < expected + 2_500_000


def test_room_is_asked_for_where_nothing_is_yet(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    check_room(tmp_path / "not" / "there", free // 2, what="as a trial")
    with pytest.raises(CheckpointError, match=r"the disk is full for a checkpoint.*as a trial"):
        check_room(tmp_path / "not" / "there", 2 * free, what="as a trial")
