"""`moe-replay record`: the same tokens through another number format, then compared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moe_replay.cli.main import main
from moe_replay.engines.fake import FakeEngine
from moe_replay.engines.files.format import RolloutFile
from moe_replay.engines.recording import GivenTokens, in_calls, record_given
from moe_replay.routing import TraceFile
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.tiny_models import write_tiny_checkpoint

KEYS = ("--rollout.max_completion_length", "20", "--batch.max_tokens_per_microbatch", "256")


@pytest.fixture
def recipe(write_recipe, tmp_path) -> Path:
    path = write_recipe()
    write_tiny_checkpoint(tmp_path / "model", num_hidden_layers=3)
    return path


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["record", *map(str, arguments)]) == 2
    return " ".join(capsys.readouterr().err.split())


def test_d17_given_tokens_are_recorded_in_another_number_format(recipe, tmp_path, capsys):
    sampled, same, fine = (tmp_path / name for name in ("sampled", "same", "fine"))
    assert main(["rollout", str(recipe), "--output", str(sampled), *KEYS]) == 0
    given = ("--from", str(sampled), *KEYS)
    assert main(["record", str(recipe), *given, "--output", str(same)]) == 0
    in_float32 = ("--rollout.dtype", "float32")
    assert main(["record", str(recipe), *given, "--output", str(fine), *in_float32]) == 0
    err = capsys.readouterr().err
    assert "Loading weights" not in err
    assert f"compare them: moe-replay compare {sampled} {fine}/embedded-float32.traces" in err
    ours, theirs = RolloutFile(sampled), TraceFile(fine / "embedded-float32.traces")
    for request_id in ours.request_ids:
        group = ours.group(request_id)
        for number, completion in enumerate(group.completions):
            tokens = np.concatenate([group.request.prompt_ids, completion.token_ids])
            trace = theirs.read(f"{request_id}/{number}")
            trace.check_tokens(tokens, where="recorded")
            assert trace.valid.tolist() == completion.trace.valid.tolist()
    flips = {}
    for name in (same, fine):
        assert main(["compare", "--json", str(sampled), str(name)]) == 0
        flips[name] = json.loads(capsys.readouterr().out)["flip_frac"]
    # One pass over all tokens rounds as sampling did, nearly; other arithmetic flips more.
    assert flips[same] < flips[fine] < 0.2


@pytest.mark.ranks
def test_d17_the_trainer_records_the_routes_of_given_tokens(recipe, tmp_path, capsys):
    sampled, recorded = tmp_path / "sampled", tmp_path / "recorded"
    in_float32 = ("--rollout.dtype", "float32", *KEYS)

    def both() -> None:
        assert main(["rollout", str(recipe), "--output", str(sampled), *in_float32]) == 0
        given = ("--from", str(sampled), "--by", "trainer", *KEYS)
        assert main(["record", str(recipe), *given, "--output", str(recorded)]) == 0

    run_ranks(both, 1)
    # Megatron and transformers in the same number format choose the same experts.
    assert main(["compare", "--json", str(sampled), str(recorded)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["flip_frac"] == 0
    assert found["num_tokens"] > 50


def test_d17_what_cannot_be_recorded_is_refused(recipe, tmp_path, capsys):
    output = ("--output", tmp_path / "out")
    missing = refusal(capsys, recipe, "--from", tmp_path / "none", *output)
    assert "holds 0 rollouts" in missing
    off = refusal(
        capsys, recipe, "--from", tmp_path, *output, "--replay.router_replay_mode", "disabled"
    )
    assert "add --replay.router_replay_mode R3" in off
    assert main(["rollout", str(recipe), "--output", str(tmp_path / "sampled")]) == 0
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "embedded-bfloat16.traces").write_bytes(b"there")
    assert "exists" in refusal(capsys, recipe, "--from", tmp_path / "sampled", *output)


def test_d17_routes_are_those_of_the_engine_and_calls_are_bounded():
    engine = FakeEngine(vocab_size=32)
    sizes = []

    class Bounded(FakeEngine):
        def generate(self, requests, sampling):
            sizes.append([len(request.prompt_ids) for request in requests])
            return super().generate(requests, sampling)

    rng = np.random.default_rng(0)
    samples = [
        GivenTokens(name=str(n), token_ids=rng.integers(2, 32, length).astype(np.int32))
        for n, length in enumerate((5, 6, 40, 7, 3))
    ]
    bounded = Bounded(vocab_size=32)
    calls = in_calls(iter(samples), max_tokens=20)
    traces = dict(pair for call in calls for pair in record_given(bounded, call))
    assert sizes == [[4, 5], [39], [6, 2]]
    for sample in samples:
        trace = traces[sample.name]
        trace.check_tokens(sample.token_ids, where=sample.name)
        expected = engine.routes_of(sample.token_ids)[:-1]
        assert (np.sort(trace.expert_ids[:-1]) == np.sort(expected)).all()
        assert trace.valid.tolist() == [True] * (len(sample.token_ids) - 1) + [False]
