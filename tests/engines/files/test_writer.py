"""Killed anywhere, a rollout's writer leaves whole groups, and the next samples only the rest."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moe_replay.engines.fake import FakeEngine
from moe_replay.engines.files.format import RolloutFile, begin_rollout
from moe_replay.engines.files.writer import RolloutWriter, union_of
from moe_replay.engines.types import FinishReason
from moe_replay.errors import CodecError, EngineError, RecipeError
from moe_replay.routing import TraceFile

from .test_format import SAMPLING, files, manifest_of, plain, requests, write

GROUPS, TRACES = ".shard-0.groups", ".shard-0.traces"


def sample_rest(folder: Path, *, num_requests: int = 3, rank: int = 0, num_ranks: int = 1) -> int:
    """Go on with a rollout as the command does, and return how many groups had to be sampled."""
    engine = FakeEngine()
    path = begin_rollout(folder, manifest_of(engine, num_requests=num_requests))
    with RolloutWriter(path, rank=rank, num_ranks=num_ranks) as writer:
        missing = [r for r in requests(num_requests) if r.request_id not in writer.kept]
        for group in engine.generate(missing, SAMPLING):
            writer.write(group)
        writer.finish()
    return len(missing)


def assert_whole(folder: Path, num_requests: int = 3) -> None:
    asked = requests(num_requests)
    answers = files(folder).generate(asked, SAMPLING)
    assert plain(answers) == plain(FakeEngine().generate(asked, SAMPLING))


def test_everything_about_a_completion_is_kept(tmp_path):
    (group, *others) = FakeEngine().generate(requests(), SAMPLING)
    first, second = group.completions
    first = replace(first, server="http://höst:8000", policy_version=5)
    second = replace(second, finish_reason=FinishReason.ABORTED, server="")
    path = begin_rollout(tmp_path, manifest_of(FakeEngine()))
    with RolloutWriter(path) as writer:
        for each in (replace(group, completions=(first, second)), *others):
            writer.write(each)
    ours = RolloutFile(path).group(0).completions
    assert [(c.server, c.policy_version, c.finish_reason) for c in ours] == [
        ("http://höst:8000", 5, FinishReason.LENGTH if first.finish_reason == "length" else "stop"),
        ("", 0, FinishReason.ABORTED),
    ]


def test_e7_cut_off_at_any_byte_the_whole_groups_are_kept(tmp_path):
    write(tmp_path / "whole")
    name = "fake-float32-policy-0"
    whole = {s: (tmp_path / "whole" / f"{name}{s}").read_bytes() for s in (GROUPS, TRACES)}
    starts = [n for n in range(len(whole[GROUPS])) if whole[GROUPS][n : n + 4] == b"GRUP"]
    assert len(starts) == 3
    rng = np.random.default_rng(0)
    cuts = {
        0,
        5,
        16,
        len(whole[GROUPS]),
        *starts,
        *rng.integers(17, len(whole[GROUPS]), 40).tolist(),
    }
    for cut in sorted(cuts):
        folder = tmp_path / str(cut)
        shutil.copytree(tmp_path / "whole", folder)
        (folder / f"{name}{GROUPS}").write_bytes(whole[GROUPS][:cut])
        kept = sum(stop <= cut for stop in [*starts[1:], len(whole[GROUPS])])
        if kept < 3:
            with pytest.raises(CodecError, match=rf"{kept} of 3 prompts are there.*resumes it"):
                files(folder)
        assert sample_rest(folder) == 3 - kept, cut
        assert_whole(folder)
        # The trace files are those of an uninterrupted writer, to the byte.
        assert (folder / f"{name}{TRACES}").read_bytes() == whole[TRACES]


def test_e7_torn_bytes_are_counted(tmp_path):
    path = write(tmp_path)
    whole = path.with_suffix(GROUPS).read_bytes()
    with RolloutWriter(path) as writer:
        assert (writer.num_cut_bytes, writer.kept) == (0, (0, 1, 2))
    record = len(whole) - whole.rindex(b"GRUP")
    traces = path.with_suffix(TRACES)
    behind = traces.stat().st_size - TraceFile(traces).place("2/0").start
    path.with_suffix(GROUPS).write_bytes(whole[:-7])
    with RolloutWriter(path) as writer:
        # Most of a record, and behind the traces that are kept two that no record names, with the
        # index.
        assert (writer.num_cut_bytes, writer.kept) == (record - 7 + behind, (0, 1))


@pytest.mark.parametrize("tail", [b"\0" * 700, b"GRUP\1\0\0\0"])
def test_e7_what_a_power_cut_leaves_is_cut_off(tmp_path, tail):
    path = write(tmp_path)
    with path.with_suffix(GROUPS).open("ab") as file:
        file.write(tail)
    with RolloutWriter(path) as writer:
        assert (writer.num_cut_bytes, writer.kept) == (len(tail), (0, 1, 2))
        writer.finish()
    assert_whole(tmp_path)


def test_e7_a_last_record_without_its_bytes_is_sampled_again(tmp_path):
    path = write(tmp_path)
    whole = bytearray(path.with_suffix(GROUPS).read_bytes())
    whole[-40:] = bytes(40)
    path.with_suffix(GROUPS).write_bytes(whole)
    assert sample_rest(tmp_path) == 1
    assert_whole(tmp_path)


def test_e7_an_altered_record_in_the_middle_is_refused_and_not_sampled_again(tmp_path):
    path = write(tmp_path)
    whole = bytearray(path.with_suffix(GROUPS).read_bytes())
    whole[whole.index(b"GRUP") + 60] ^= 1
    path.with_suffix(GROUPS).write_bytes(whole)
    with pytest.raises(CodecError, match=r"request 0: the checksum"):
        RolloutWriter(path)


def test_e7_traces_that_are_gone_are_refused(tmp_path):
    path = write(tmp_path)
    stored = path.with_suffix(TRACES).read_bytes()
    for changed in (stored[:100], bytes(len(stored)), b""):
        path.with_suffix(TRACES).write_bytes(changed)
        with pytest.raises(CodecError, match="sample it again"):
            RolloutWriter(path)


@pytest.mark.ranks
def test_e7_killed_in_the_middle_of_a_write_it_goes_on(tmp_path):
    engine = FakeEngine()
    path = begin_rollout(tmp_path, manifest_of(engine, num_requests=40))
    asked = requests(40)
    sampled = engine.generate(asked, SAMPLING)
    kept, num_kills = 0, 0
    rng = np.random.default_rng(3)
    while kept < 40:
        reader, writer_end = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            with RolloutWriter(path) as writer:
                for group in sampled:
                    if group.request.request_id not in writer.kept:
                        writer.write(group)
                        os.write(writer_end, b".")
            os._exit(0)
        os.close(writer_end)
        # Killed as soon as it has reported so many groups, while it writes the next.
        reported = sum(len(os.read(reader, 1)) for _ in range(int(rng.integers(1, 8))))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reader, "rb") as rest:
            reported += len(rest.read())
        with RolloutWriter(path) as writer:
            now = sorted(writer.kept)
        assert now == list(range(len(now)))
        assert len(now) - kept in (reported, reported + 1) and reported > 0
        kept, num_kills = len(now), num_kills + 1
    assert num_kills > 5
    assert sample_rest(tmp_path, num_requests=40) == 0
    assert_whole(tmp_path, 40)


def test_e7_several_ranks_write_one_rollout_and_others_go_on_with_it(tmp_path):
    engine = FakeEngine()
    path = begin_rollout(tmp_path, manifest_of(engine, num_requests=12))
    sampled = engine.generate(requests(12), SAMPLING)
    for rank in range(5):
        # Of five ranks the last wrote half a record and the others two groups each.
        with RolloutWriter(path, rank=rank, num_ranks=5) as writer:
            for group in sampled[2 * rank : 2 * rank + 2]:
                writer.write(group)
    torn = path.with_suffix(".shard-4.groups")
    torn.write_bytes(torn.read_bytes()[:-3])
    writers = [RolloutWriter(path, rank=rank, num_ranks=2) for rank in range(2)]
    assert [sorted(writer.kept) for writer in writers] == [[0, 1, 4, 5, 8], [2, 3, 6, 7]]
    assert writers[0].num_cut_bytes > 0 and writers[1].num_cut_bytes == 0
    present = union_of([writer.kept for writer in writers], "here")
    for number in range(12):
        if number not in present:
            writers[number % 2].write(sampled[number])
    for writer in writers:
        writer.finish()
        writer.close()
    assert_whole(tmp_path, 12)
    # Every shard's traces are a trace file, the repaired one too; together they are the rollout's.
    shards = sorted(tmp_path.glob("*.traces"))
    assert len(shards) == 5 and len(TraceFile(*shards)) == 24


def test_e7_a_request_that_two_shards_hold_is_refused(tmp_path):
    path = write(tmp_path)
    with RolloutWriter(path, rank=1, num_ranks=2) as writer:
        writer.write(FakeEngine().generate(requests(1), SAMPLING)[0])
        assert writer.kept == ()
    with pytest.raises(CodecError, match=r"requests \[0\] more than once"):
        files(tmp_path)
    with pytest.raises(CodecError, match=r"several shards hold requests \[0\]"):
        union_of([[0, 1, 2], [0]], str(path))
    assert union_of([[0, 1], [2]], str(path)) == {0, 1, 2}


def test_e7_two_writers_at_a_time_are_refused(tmp_path):
    path = begin_rollout(tmp_path, manifest_of(FakeEngine()))
    with RolloutWriter(path), pytest.raises(RecipeError, match="by another process"):
        RolloutWriter(path)
    RolloutWriter(path).close()


def test_e7_a_rollout_that_is_there_is_left_alone(tmp_path):
    path = write(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert sample_rest(tmp_path) == 0
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    # More prompts resume it, fewer are refused.
    assert sample_rest(tmp_path, num_requests=5) == 2
    assert_whole(tmp_path, 5)
    with pytest.raises(RecipeError, match="begun for 5 prompts, now 3 are"):
        begin_rollout(path.parent, manifest_of(FakeEngine()))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sampling": replace(SAMPLING, seed=4)}, r"sampling.seed: was 3, is 4"),
        ({"weights": {"model.safetensors": "b"}}, r"weights.model.safetensors: was a, is b"),
        (
            {"engine": replace(FakeEngine().description, version="2")},
            r"engine.version: was 1, is 2",
        ),
        ({"first_request": 1}, r"first_request: was 0, is 1"),
    ],
)
def test_e7_another_rollout_of_the_same_name_is_refused(tmp_path, change, named):
    told = {"weights": {"model.safetensors": "a"}}
    begin_rollout(tmp_path, manifest_of(FakeEngine(), **told))
    with pytest.raises(RecipeError, match=named):
        begin_rollout(tmp_path, manifest_of(FakeEngine(), **{**told, **change}))


def test_groups_that_break_the_contract_leave_no_bytes(tmp_path):
    first, second, _ = FakeEngine().generate(requests(), SAMPLING)
    path = begin_rollout(tmp_path, manifest_of(FakeEngine()))
    with RolloutWriter(path) as writer:
        writer.write(first)
        size = path.with_suffix(GROUPS).stat().st_size
        with pytest.raises(EngineError):
            writer.write(replace(second, completions=second.completions[:1]))
        assert path.with_suffix(GROUPS).stat().st_size == size
    with RolloutWriter(path) as writer:
        assert (writer.kept, writer.num_cut_bytes) == ((0,), 0)
