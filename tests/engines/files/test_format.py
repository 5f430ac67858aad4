"""Rollouts on disk, and the engine that answers from them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_replay.checkpoint.facts import ModelFacts
from moe_replay.engines.fake import FakeEngine
from moe_replay.engines.files.engine import FilesEngine
from moe_replay.engines.files.format import Manifest, RolloutFile, begin_rollout
from moe_replay.engines.files.writer import RolloutWriter
from moe_replay.engines.types import Request, RolloutGroup, SamplingParams
from moe_replay.errors import CodecError, EngineError, RecipeError, TraceError
from moe_replay.routing import RoutedModel

SAMPLING = SamplingParams(max_completion_length=8, temperature=0.7, seed=3)
FACTS = ModelFacts(
    vocab_size=32,
    max_context_length=4096,
    eos_ids=(1,),
    routed=RoutedModel(moe_layers=(0, 1), num_decoder_layers=2, num_experts=8, topk=2),
    weight_shapes={},
    tied_names=frozenset(),
)


def requests(count: int = 3, *, first: int = 0) -> list[Request]:
    return [
        Request(
            request_id=first + number,
            prompt_ids=np.array([4, 5 + number % 20, 6], dtype=np.int32),
            num_generations=2,
        )
        for number in range(count)
    ]


def manifest_of(sampler: FakeEngine, *, num_requests: int = 3, **changed: Any) -> Manifest:
    told = {
        "engine": sampler.description,
        "policy_version": sampler.policy_version,
        "sampling": SAMPLING,
        "first_request": 0,
        "num_requests": num_requests,
    }
    return Manifest(**{**told, **changed})


def write(
    folder: Path, groups: list[RolloutGroup] | None = None, *, engine: FakeEngine | None = None
) -> Path:
    engine = engine or FakeEngine()
    path = begin_rollout(folder, manifest_of(engine))
    with RolloutWriter(path) as writer:
        for group in engine.generate(requests(), SAMPLING) if groups is None else groups:
            writer.write(group)
        writer.finish()
    return path


def files(path: Path, **options: Any) -> FilesEngine:
    return FilesEngine(path, **{"facts": FACTS, "record_routes": True, **options})


def plain(groups: list[RolloutGroup]) -> list[Any]:
    """Return everything that a group holds, as things that compare by value."""
    return [
        (
            group.request.request_id,
            group.request.prompt_ids.tolist(),
            c.token_ids.tolist(),
            c.rollout_logprobs.tolist(),
            c.finish_reason,
            c.policy_version,
            c.trace.expert_ids[c.trace.valid].tolist(),
            c.trace.valid.tolist(),
            c.trace.token_digest.tolist(),
            c.trace.origin,
            c.candidates
            and (
                c.candidates.counts.tolist(),
                c.candidates.ids.tolist(),
                c.candidates.kept_mass.tolist(),
            ),
        )
        for group in groups
        for c in group.completions
    ]


@pytest.mark.parametrize("limits", [{}, {"top_p": 0.8, "keeps_candidates": True}], ids=str)
def test_what_was_sampled_comes_back_as_it_was(tmp_path, limits):
    sampling = replace(SAMPLING, **limits)
    path = begin_rollout(tmp_path, manifest_of(FakeEngine(), sampling=sampling))
    with RolloutWriter(path) as writer:
        for group in FakeEngine().generate(requests(), sampling):
            writer.write(group)
        writer.finish()
    engine = files(tmp_path)
    asked = requests()[::-1]
    assert plain(engine.generate(asked, sampling)) == plain(FakeEngine().generate(asked, sampling))
    assert engine.description.name == "files" and engine.description.version == "fake 1"


def at_version(version: int) -> FakeEngine:
    engine = FakeEngine()
    engine.load_weights([], policy_version=version)
    return engine


def test_e7_each_policy_version_of_a_folder_answers_for_itself(tmp_path):
    first, second = write(tmp_path), write(tmp_path, engine=at_version(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("fake-float32-policy-0.json", "fake-float32-policy-0.shard-0.groups"),
        *("fake-float32-policy-0.shard-0.traces", "fake-float32-policy-3.json"),
        *("fake-float32-policy-3.shard-0.groups", "fake-float32-policy-3.shard-0.traces"),
    ]
    engine = files(tmp_path)
    for version in (0, 3):
        engine.load_weights([], policy_version=version)
        expected = at_version(version).generate(requests(), SAMPLING)
        assert plain(engine.generate(requests(), SAMPLING)) == plain(expected)
    # The manifest of one of them names that one alone.
    engine = files(first)
    engine.load_weights([], policy_version=3)
    with pytest.raises(EngineError, match=r"policy version \[0\], the trainer is at 3"):
        engine.generate(requests(), SAMPLING)
    with pytest.raises(RecipeError, match=r"2 rollouts.*name the manifest"):
        RolloutFile(tmp_path)
    assert RolloutFile(second).manifest.policy_version == 3


def test_e7_a_version_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    write(tmp_path), write(tmp_path, engine=at_version(3)), write(tmp_path, engine=at_version(7))
    strict, lenient = files(tmp_path), files(tmp_path, allow_stale=True)
    for version, served in ((1, 0), (2, 0), (3, 3), (5, 3), (9, 7)):
        for engine in (strict, lenient):
            engine.load_weights([], policy_version=version)
        assert {row[5] for row in plain(lenient.generate(requests(), SAMPLING))} == {served}
        if version == 5:
            with pytest.raises(EngineError, match=r"\[0, 3, 7\], the trainer is at 5.*allow_stale"):
                strict.generate(requests(), SAMPLING)


@pytest.mark.parametrize("odd", ["version", "engine"])
def test_rollouts_that_do_not_belong_together_are_refused(tmp_path, odd):
    write(tmp_path)
    other = write(tmp_path / "other", engine=at_version(2))
    told = json.loads(other.read_text())
    if odd == "version":
        told["policy_version"] = 0
    else:
        told["engine"]["version"] = "2"
    for file in other.parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / other.name).write_text(json.dumps(told))
    with pytest.raises(RecipeError, match="name the manifest of one of them"):
        files(tmp_path)


def test_an_empty_folder_and_no_folder_hold_no_rollout(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(RecipeError, match=r"0 rollouts.*moe-replay rollout"):
            RolloutFile(path)
        with pytest.raises(RecipeError, match=r"0 rollouts.*moe-replay rollout"):
            files(path)


def test_groups_that_break_the_contract_are_not_written(tmp_path):
    first, second, _ = FakeEngine().generate(requests(), SAMPLING)
    swapped = replace(first, completions=second.completions)
    with pytest.raises(TraceError):
        write(tmp_path, [swapped])
    with pytest.raises(CodecError, match="0 of 3 prompts are there"):
        files(tmp_path)


def test_files_run_out(tmp_path):
    write(tmp_path)
    with pytest.raises(
        EngineError,
        match=r"request 3 was not sampled.*3 requests, 0 to 2, of policy version 0.*run out",
    ):
        files(tmp_path).generate(requests(4), SAMPLING)


def test_another_prompt_is_refused(tmp_path):
    write(tmp_path)
    other = replace(requests()[0], prompt_ids=np.array([4, 5, 7], dtype=np.int32))
    with pytest.raises(EngineError, match="another prompt"):
        files(tmp_path).generate([other], SAMPLING)


def test_another_number_of_completions_is_refused(tmp_path):
    write(tmp_path)
    with pytest.raises(EngineError, match=r"sampled 2 times, expected 3"):
        files(tmp_path).generate([replace(requests()[0], num_generations=3)], SAMPLING)


@pytest.mark.parametrize("change", [{"temperature": 1.0}, {"top_k": 5}, {"stop_token_ids": (9,)}])
def test_another_way_to_sample_is_refused(tmp_path, change):
    write(tmp_path)
    with pytest.raises(RecipeError, match="other settings"):
        files(tmp_path).generate(requests(), replace(SAMPLING, **change))
    files(tmp_path).generate(requests(), replace(SAMPLING, seed=99))


def test_completions_of_another_policy_are_refused_unless_allowed(tmp_path):
    write(tmp_path)
    strict, lenient = files(tmp_path), files(tmp_path, allow_stale=True)
    for engine in (strict, lenient):
        engine.generate(requests(), SAMPLING)
        engine.load_weights([], policy_version=1)
    with pytest.raises(
        EngineError, match=r"policy version \[0\], the trainer is at 1.*allow_stale"
    ):
        strict.generate(requests(), SAMPLING)
    assert plain(lenient.generate(requests(), SAMPLING))[0][5] == 0


def test_files_of_another_model_are_refused(tmp_path):
    write(tmp_path)
    routed = replace(FACTS.routed, num_experts=16)
    with pytest.raises(RecipeError, match="sampled from a model"):
        files(tmp_path, facts=replace(FACTS, routed=routed))


def test_files_without_routes_are_refused_where_routes_are_replayed(tmp_path):
    engine = FakeEngine()
    groups = [
        replace(g, completions=tuple(replace(c, trace=None) for c in g.completions))
        for g in engine.generate(requests(), SAMPLING)
    ]
    bare = replace(engine.description, records_routes=False)
    path = begin_rollout(tmp_path, manifest_of(engine, engine=bare))
    with RolloutWriter(path) as writer:
        for group in groups:
            writer.write(group)
        writer.finish()
    assert not list(tmp_path.glob("*.traces"))
    with pytest.raises(RecipeError, match="holds no routes"):
        files(path)
    without = files(path, record_routes=False).generate(requests(), SAMPLING)
    assert {c.trace for g in without for c in g.completions} == {None}


@pytest.mark.parametrize("suffix", [".json", ".shard-0.groups", ".shard-0.traces"])
def test_every_file_of_a_rollout_is_needed(tmp_path, suffix):
    path = write(tmp_path)
    path.with_suffix(suffix).unlink()
    with pytest.raises((CodecError, RecipeError)):
        files(tmp_path)


def test_e7_opening_reads_headers_and_reading_a_group_reads_every_byte(tmp_path):
    path = write(tmp_path).with_suffix(".shard-0.groups")
    whole = path.read_bytes()
    rng = np.random.default_rng(7)
    start = whole.index(b"GRUP", whole.index(b"GRUP") + 4)
    stop = whole.index(b"GRUP", start + 4)
    # Past the header of the middle record, whatever bit is flipped.
    for at in rng.integers(start + 32, stop, 40):
        altered = bytearray(whole)
        altered[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(altered)
        engine = files(tmp_path)
        with pytest.raises(CodecError, match=r"request 1: the checksum does not fit"):
            engine.generate(requests(2)[1:], SAMPLING)
        # The control: the other groups are whole.
        assert len(engine.generate([requests()[0], requests()[2]], SAMPLING)) == 2


def test_e7_an_altered_header_is_refused(tmp_path):
    path = write(tmp_path).with_suffix(".shard-0.groups")
    whole = path.read_bytes()
    start = whole.index(b"GRUP", whole.index(b"GRUP") + 4)
    for at in range(start, start + 32):
        altered = bytearray(whole)
        altered[at] ^= 64
        path.write_bytes(altered)
        with pytest.raises(CodecError):
            files(tmp_path).generate(requests(), SAMPLING)


def test_e7_what_a_reader_gets_does_not_change_with_the_file(tmp_path):
    path = write(tmp_path)
    before = files(tmp_path).generate(requests(), SAMPLING)
    kept = plain(before)
    for suffix in (".shard-0.groups", ".shard-0.traces"):
        file = path.with_suffix(suffix)
        with file.open("r+b") as opened:
            opened.write(bytes(file.stat().st_size))
    assert plain(before) == kept


def test_traces_of_another_rollout_are_refused(tmp_path):
    ours = write(tmp_path / "ours").with_suffix(".shard-0.traces")
    theirs = write(
        tmp_path / "theirs", FakeEngine(seed=1).generate(requests(), replace(SAMPLING, seed=9))
    )
    ours.write_bytes(theirs.with_suffix(".shard-0.traces").read_bytes())
    with pytest.raises(TraceError):
        files(tmp_path / "ours").generate(requests(), SAMPLING)


@pytest.mark.parametrize("change", [{"format": 2}, {"num_requests": 4}, {"extra": 1}])
def test_another_manifest_is_refused(tmp_path, change):
    path = write(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CodecError):
        RolloutFile(path)


def test_e7_the_old_format_is_refused_with_how_to_sample_it_again(tmp_path):
    path = write(tmp_path)
    old = {"format": 1, "engine": {}, "policy_version": 0, "num_requests": 3, "sha256": "0"}
    path.write_text(json.dumps(old))
    for open_it in (RolloutFile, files):
        with pytest.raises(
            CodecError, match=r"format 1, this release reads format 3.*rollout RECIPE"
        ):
            open_it(path)


def test_a_closed_engine_answers_nothing(tmp_path):
    write(tmp_path)
    engine = files(tmp_path)
    engine.close(), engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.generate(requests(), SAMPLING)
