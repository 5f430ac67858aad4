"""Rollouts on disk, and the engine that answers from them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_replay.errors import CodecError, EngineError, RecipeError, TraceError
from moe_replay.rollout.fake import FakeEngine
from moe_replay.rollout.files_engine import FilesEngine
from moe_replay.rollout.model_facts import ModelFacts
from moe_replay.rollout.rollout_files import RolloutFile, write_rollout
from moe_replay.rollout.types import Request, RolloutGroup, SamplingParams
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
            prompt_ids=np.array([4, 5 + number, 6], dtype=np.int32),
            num_generations=2,
        )
        for number in range(count)
    ]


def write(
    folder: Path, groups: list[RolloutGroup] | None = None, *, engine: FakeEngine | None = None
) -> Path:
    engine = engine or FakeEngine()
    return write_rollout(
        folder,
        engine.generate(requests(), SAMPLING) if groups is None else groups,
        description=engine.description,
        policy_version=engine.policy_version,
        sampling=SAMPLING,
    )


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
        )
        for group in groups
        for c in group.completions
    ]


def test_what_was_sampled_comes_back_as_it_was(tmp_path):
    write(tmp_path)
    engine = files(tmp_path)
    asked = requests()[::-1]
    assert plain(engine.generate(asked, SAMPLING)) == plain(FakeEngine().generate(asked, SAMPLING))
    assert engine.description.name == "files" and engine.description.version == "fake 1"


def test_rollouts_of_two_policies_are_kept_apart(tmp_path):
    later = FakeEngine()
    later.load_weights([], policy_version=3)
    first, second = write(tmp_path), write(tmp_path, engine=later)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("fake-float32-policy-0.json", "fake-float32-policy-0.jsonl"),
        *("fake-float32-policy-0.traces", "fake-float32-policy-3.json"),
        *("fake-float32-policy-3.jsonl", "fake-float32-policy-3.traces"),
    ]
    with pytest.raises(RecipeError, match=r"2 rollouts.*name the manifest"):
        files(tmp_path)
    for path, version in ((first, 0), (second, 3)):
        (group, *_) = files(path, allow_stale=True).generate(requests(), SAMPLING)
        assert {c.policy_version for c in group.completions} == {version}


def test_a_rollout_is_not_overwritten(tmp_path):
    write(tmp_path)
    with pytest.raises(RecipeError, match="exists"):
        write(tmp_path)


def test_a_writer_that_dies_leaves_no_rollout(tmp_path):
    def dying() -> Any:
        yield from FakeEngine().generate(requests(1), SAMPLING)
        raise EngineError("the engine died")

    with pytest.raises(EngineError, match="the engine died"):
        write(tmp_path, dying())
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RecipeError, match=r"0 rollouts.*moe-replay rollout"):
        files(tmp_path)


def test_groups_that_break_the_contract_are_not_written(tmp_path):
    first, second, _ = FakeEngine().generate(requests(), SAMPLING)
    swapped = replace(first, completions=second.completions)
    with pytest.raises(TraceError):
        write(tmp_path, [swapped])
    assert list(tmp_path.iterdir()) == []


def test_files_run_out(tmp_path):
    write(tmp_path)
    with pytest.raises(
        EngineError, match=r"request 3 was not sampled.*3 requests, 0 to 2.*run out"
    ):
        files(tmp_path).generate(requests(4), SAMPLING)


def test_another_prompt_is_refused(tmp_path):
    write(tmp_path)
    other = replace(requests()[0], prompt_ids=np.array([4, 5, 7], dtype=np.int32))
    with pytest.raises(EngineError, match="another prompt"):
        files(tmp_path).generate([other], SAMPLING)


def test_another_number_of_completions_is_refused(tmp_path):
    write(tmp_path)
    with pytest.raises(EngineError, match=r"sampled 2 times, asked for are 3"):
        files(tmp_path).generate([replace(requests()[0], num_generations=3)], SAMPLING)


@pytest.mark.parametrize("change", [{"temperature": 1.0}, {"top_k": 5}, {"stop_token_ids": (9,)}])
def test_another_way_to_sample_is_refused(tmp_path, change):
    write(tmp_path)
    with pytest.raises(RecipeError, match="another setting"):
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
    path = write_rollout(
        tmp_path,
        groups,
        description=replace(engine.description, records_routes=False),
        policy_version=0,
        sampling=SAMPLING,
    )
    with pytest.raises(RecipeError, match="holds no routes"):
        files(path)
    bare = files(path, record_routes=False).generate(requests(), SAMPLING)
    assert {c.trace for g in bare for c in g.completions} == {None}


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".traces"])
def test_every_file_of_a_rollout_is_needed(tmp_path, suffix):
    path = write(tmp_path)
    path.with_suffix(suffix).unlink()
    with pytest.raises((CodecError, RecipeError)):
        files(tmp_path)


def test_an_altered_log_probability_is_refused(tmp_path):
    path = write(tmp_path).with_suffix(".jsonl")
    lines = path.read_text().splitlines()
    told = json.loads(lines[0])
    told["completions"][0]["rollout_logprobs"][0] -= 0.125
    path.write_text("\n".join([json.dumps(told), *lines[1:]]) + "\n")
    with pytest.raises(CodecError, match="checksum"):
        files(tmp_path)


def test_traces_of_another_rollout_are_refused(tmp_path):
    ours = write(tmp_path / "ours")
    theirs = write(
        tmp_path / "theirs", FakeEngine(seed=1).generate(requests(), replace(SAMPLING, seed=9))
    )
    ours.with_suffix(".traces").write_bytes(theirs.with_suffix(".traces").read_bytes())
    with pytest.raises(TraceError):
        files(ours).generate(requests(), SAMPLING)


@pytest.mark.parametrize("change", [{"format": 2}, {"num_requests": 4}, {"extra": 1}])
def test_another_manifest_is_refused(tmp_path, change):
    path = write(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CodecError):
        RolloutFile(path)


def test_a_closed_engine_answers_nothing(tmp_path):
    write(tmp_path)
    engine = files(tmp_path)
    engine.close(), engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.generate(requests(), SAMPLING)
