"""The rollout that a checkpoint holds: which files a rank reads of it when a run is resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moe_replay.engines.fake import FakeEngine
from moe_replay.engines.files import format as rollout_format
from moe_replay.engines.types import Request, SamplingParams
from moe_replay.errors import CodecError
from moe_replay.grpo.ahead import begin_saving, load_groups, save_groups, why_dropped

SAMPLING = SamplingParams(max_completion_length=8, temperature=0.7, seed=3)
NUM_RANKS = 4


def requests(*numbers: int) -> list[Request]:
    return [
        Request(
            request_id=number,
            prompt_ids=np.array([4, 5 + number, 6], dtype=np.int32),
            num_generations=2,
        )
        for number in numbers
    ]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Write a rollout of which each of four ranks has two requests: 0 and 4, 1 and 5, ..."""
    engine = FakeEngine()
    numbers = range(2 * NUM_RANKS)
    begin_saving(tmp_path, engine.description, SAMPLING, policy_version=0, requests=numbers)
    for rank in range(NUM_RANKS):
        groups = engine.generate(requests(rank, rank + NUM_RANKS), SAMPLING)
        save_groups(tmp_path, groups, rank=rank, num_ranks=NUM_RANKS)
    return tmp_path


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which the number of every shard is added whose index is read."""
    numbers: list[int] = []
    find_groups = rollout_format.find_groups

    def counted(stored: memoryview, where: str) -> rollout_format.FoundGroups:
        numbers.append(rollout_format.shard_number(Path(where)))
        return find_groups(stored, where)

    monkeypatch.setattr(rollout_format, "find_groups", counted)
    return numbers


def test_a_rank_of_the_same_layout_reads_its_own_shard_alone(saved: Path, read: list[int]) -> None:
    for rank in range(NUM_RANKS):
        asked = requests(rank, rank + NUM_RANKS)
        groups = load_groups(saved, asked, SAMPLING, rank=rank)
        assert groups is not None
        assert [group.request.request_id for group in groups] == [rank, rank + NUM_RANKS]
        assert all(c.trace is not None for group in groups for c in group.completions)
    assert read == [0, 1, 2, 3]


def test_a_rank_of_another_layout_reads_until_it_has_all(saved: Path, read: list[int]) -> None:
    """The first of two ranks has requests 0, 2, 4 and 6, which ranks 0 and 2 of four saved."""
    groups = load_groups(saved, requests(0, 2, 4, 6), SAMPLING, rank=0)
    assert groups is not None and len(groups) == 4
    assert read == [0, 1, 2]


def test_a_reader_of_a_whole_rollout_reads_every_shard(saved: Path, read: list[int]) -> None:
    rollout_format.RolloutFile(saved)
    assert read == [0, 1, 2, 3]


def test_what_was_not_saved_is_sampled_again_and_no_file_is_read(
    saved: Path, read: list[int]
) -> None:
    assert load_groups(saved, requests(7, 8), SAMPLING, rank=3) is None
    assert load_groups(saved, requests(3), replace(SAMPLING, seed=4), rank=3) is None
    assert read == []


def test_a_lost_shard_is_damage_for_whom_it_belongs_to(saved: Path) -> None:
    (shard,) = saved.glob("*.shard-2.groups")
    shard.unlink()
    assert load_groups(saved, requests(1, 5), SAMPLING, rank=1) is not None
    with pytest.raises(CodecError, match="request 2 is the first that is missing"):
        load_groups(saved, requests(2, 6), SAMPLING, rank=2)


def of_format(saved: Path, number: object) -> None:
    (path,) = saved.glob("*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": number}))


def test_a_rollout_of_another_format_is_sampled_again_by_a_run_and_refused_elsewhere(
    saved: Path, read: list[int]
) -> None:
    assert load_groups(saved, requests(0, 4), SAMPLING, rank=0) is not None
    assert "for other prompts or in another way" in why_dropped(saved)
    del read[:]
    of_format(saved, 2)
    assert load_groups(saved, requests(0, 4), SAMPLING, rank=0) is None
    assert "by another revision, in another format" in why_dropped(saved)
    assert read == []
    # The controls: as a folder of `moe-replay rollout` it is refused, and a strange one is damage.
    with pytest.raises(CodecError, match="format 2, this release reads format 3: sample it again"):
        rollout_format.RolloutFile(saved)
    of_format(saved, "two")
    with pytest.raises(CodecError, match="format two"):
        load_groups(saved, requests(0, 4), SAMPLING, rank=0)
