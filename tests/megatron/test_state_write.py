"""A checkpoint is what the model was when it began, whatever happens while it is written."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_replay.engines.fake import FakeEngine
from moe_replay.errors import CheckpointError
from moe_replay.grpo.ahead import begin_saving, save_groups
from moe_replay.megatron.actor import MegatronActor
from moe_replay.megatron.checkpoint import CheckpointFolder, RunPosition
from moe_replay.megatron.room import check_room, disk_bytes, expected_bytes
from moe_replay.megatron.state_write import _OwnFiles
from moe_replay.testing.layouts import CASES
from moe_replay.testing.memory import peak_bytes
from moe_replay.testing.policies import start_policy
from moe_replay.testing.ranks import run_ranks

from ..engines.files.test_format import SAMPLING, requests
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


def measured_save(checkpoint: Path, path: Path) -> tuple[float, list[str]]:
    """Return the bytes a parameter that a save takes for tensors, and Megatron's warnings."""
    actor = start_policy(checkpoint, CASES["dp2"].layout)
    update(actor)
    folder = CheckpointFolder(path, save_total_limit=1)
    told: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron").addHandler(handler)
    # The first one checks the layout too.
    folder.save(actor, at(actor, 1))
    peak = peak_bytes(lambda: folder.save(actor, at(actor, 2)))
    return peak / sum(value.numel() for value in weights(actor).values()), told


def test_the_optimizer_is_gathered_by_the_first_replica_alone(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Main weight and two moments take 12 bytes a parameter where they are gathered."""
    (first, told), (second, also_told) = run_ranks(measured_save, 2, checkpoint, tmp_path)
    print(f"bytes a parameter: {first:.1f} on the first rank, {second:.1f} on the other")
    assert first > 12
    # Its own half at most, and a few headers.
    assert second < 7
    assert not [text for text in told + also_told if "differs" in text]


def flushed_names(checkpoint: Path, path: Path) -> list[str]:
    """Return what this rank flushed of a folder beside the weights, and the renames between."""
    actor = start_policy(checkpoint, CASES["dp2"].layout)
    rank = torch.distributed.get_rank()
    seen: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def noted(file: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{file}"))
        if "rollout" in name.parts:
            seen.append("/".join(name.parts[name.parts.index("rollout") :]))
        fsync(file)

    def renamed(self: Path, target: Path) -> Path:
        seen.append("renamed")
        return rename(self, target)

    engine = FakeEngine()
    groups = engine.generate(requests(2, first=2 * rank), SAMPLING)

    def begin(folder: Path) -> None:
        if rank == 0:
            begin_saving(
                folder / "rollout",
                engine.description,
                SAMPLING,
                policy_version=0,
                requests=range(4),
            )

    def write(folder: Path) -> None:
        save_groups(folder / "rollout", groups, rank=rank, num_ranks=2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", noted)
        patch.setattr(Path, "rename", renamed)
        CheckpointFolder(path, save_total_limit=1).save(actor, at(actor, 1), beside=[begin, write])
    return seen


def test_each_rank_flushes_the_files_of_its_own_rollout(checkpoint: Path, tmp_path: Path) -> None:
    first, second = run_ranks(flushed_names, 2, checkpoint, tmp_path)
    shards = [
        {path.name for path in (tmp_path / "step-000001" / "rollout").glob(f"*.shard-{rank}.*")}
        for rank in range(2)
    ]
    assert [len(each) for each in shards] == [2, 2]
    assert set(second) == {f"rollout/{name}" for name in shards[1]}
    # The names of all files, once, after the last of its own files and before the rename.
    own = [number for number, name in enumerate(first) if ".shard-" in name]
    assert {Path(first[number]).name for number in own} == shards[0]
    assert first[own[-1] :].count("rollout") == 1
    assert first[-2:] == ["rollout", "renamed"]


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
