"""`moe-replay serve`: what it refuses, and a real one in a process of its own."""

from __future__ import annotations

import argparse
from contextlib import closing
from dataclasses import replace

import numpy as np
import psutil
import pytest

from moe_replay.checkpoint.facts import checkpoint_tensors, read_facts
from moe_replay.cli.main import main
from moe_replay.cli.serve import add_options, check_exposure, check_options, room_for_pushes
from moe_replay.engines.embedded.engine import EmbeddedEngine
from moe_replay.engines.servers.engine import ServerEngine
from moe_replay.engines.types import Request, SamplingParams
from moe_replay.errors import RecipeError
from moe_replay.recipe.bearer import read_token
from moe_replay.testing.tiny_models import write_tiny_checkpoint

from ..support.served import ServerProcess

TOKEN = "0123456789abcdef"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "rollouts.example"])
def test_an_open_address_needs_a_token(host):
    with pytest.raises(RecipeError, match="--token-file"):
        check_exposure(host, None)
    check_exposure(host, TOKEN)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_needs_no_token(host):
    check_exposure(host, None)


def test_an_open_server_without_a_token_is_not_started(capsys):
    assert main(["serve", "nowhere", "--host", "0.0.0.0"]) == 2
    assert "can be reached from other machines" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "short", "two words of a token", "tökentökentöken!"])
def test_a_token_that_is_none_is_refused(tmp_path, text):
    path = tmp_path / "token"
    path.write_text(text)
    with pytest.raises(RecipeError, match="expected at least 16 ASCII"):
        read_token(path)


def test_a_token_is_read_without_the_newline(tmp_path):
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    assert read_token(path) == TOKEN
    assert read_token(None) is None


def test_a_token_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        read_token(tmp_path / "token")


@pytest.mark.vllm
def test_r10_a_port_that_is_taken_is_found_before_the_model_is_read(capsys):
    from moe_replay.engines.serve.socket import bind

    with bind("127.0.0.1", 0) as held:
        port = held.getsockname()[1]
        assert main(["serve", "nowhere", "--port", str(port)]) == 2
    said = capsys.readouterr().err
    assert "cannot be listened on" in said
    assert "nowhere" not in said


def options(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser.parse_args(["model", *given])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--max-batch-size", "0"), "--max-batch-size is 0, expected at least 1"),
        (("--tensor-parallel-size", "0"), "--tensor-parallel-size is 0"),
        (("--data-parallel-size", "-1"), "--data-parallel-size is -1"),
        (("--gpu-memory-utilization", "1.5"), "--gpu-memory-utilization is 1.5"),
        (("--gpu-memory-utilization", "0"), "--gpu-memory-utilization is 0.0"),
        (("--kv-cache-gib", "0"), "--kv-cache-gib is 0.0"),
        (("--port", "70000"), "--port is 70000"),
        (("--engine", "embedded", "--tensor-parallel-size", "2"), "--tensor-parallel-size: only"),
        (("--engine", "embedded", "--max-model-len", "64"), "--max-model-len: only"),
    ],
)
def test_options_that_cannot_be_are_refused(given, message):
    check_options(options())
    with pytest.raises(RecipeError, match=message):
        check_options(options(*given))


def test_the_context_length_has_the_name_that_vllm_gives_it_and_ours():
    assert options("--max-model-len", "64").max_context_length == 64
    assert options("--max-context-length", "64").max_context_length == 64


def test_a_folder_without_room_for_pushes_is_warned_about(tmp_path):
    model = write_tiny_checkpoint(tmp_path / "model", num_hidden_layers=2)
    facts = read_facts(model)
    assert room_for_pushes(tmp_path, facts, "bfloat16") is None
    shape = (1 << 40, 1 << 10)
    large = replace(facts, weight_shapes={"model.embed_tokens.weight": shape})
    assert "--weights-dir" in room_for_pushes(tmp_path, large, "bfloat16")


@pytest.mark.slow
@pytest.mark.vllm
def test_a_served_vllm_of_two_workers_samples_takes_weights_and_leaves_nothing(tmp_path):
    first = write_tiny_checkpoint(tmp_path / "first", seed=0, num_hidden_layers=2)
    second = write_tiny_checkpoint(tmp_path / "second", seed=1, num_hidden_layers=2)
    token_file, weights_dir = tmp_path / "token", tmp_path / "weights"
    token_file.write_text(TOKEN)
    token_file.chmod(0o600)
    weights_dir.mkdir()
    requests = [
        Request(request_id=number, prompt_ids=np.arange(5, 15, dtype=np.int32), num_generations=2)
        for number in range(3)
    ]
    sampling = SamplingParams(max_completion_length=12, temperature=0.9, seed=2)
    expected = {}
    for name, model in (("first", first), ("second", second)):
        embedded = EmbeddedEngine(model, dtype="float32")
        expected[name] = embedded.generate(requests, sampling)
        embedded.close()
    given = ["--dtype", "float32", "--token-file", str(token_file), "--kv-cache-gib", "0.05"]
    given += ["--tensor-parallel-size", "2", "--weights-dir", str(weights_dir)]
    with ServerProcess(first, *given) as server:
        server.wait()
        started = psutil.Process(server.pid).children(recursive=True)
        assert len(started) >= 3  # a core and two workers
        engine = ServerEngine(
            [server.url],
            facts=read_facts(first),
            run="cli",
            dtype="float32",
            record_routes=True,
            token=TOKEN,
        )
        with closing(engine):
            before = engine.generate(requests, sampling)
            engine.load_weights(checkpoint_tensors(second), policy_version=1)
            after = engine.generate(requests, sampling)
            assert engine.faults == dict.fromkeys(engine.faults, 0)
        assert server.stop() == 0
        _, alive = psutil.wait_procs(started, timeout=300)
        assert alive == []
    assert list(weights_dir.iterdir()) == []
    for ours, theirs in ((before, expected["first"]), (after, expected["second"])):
        pairs = zip(completions(ours), completions(theirs), strict=True)
        for mine, other in pairs:
            assert mine.token_ids.tolist() == other.token_ids.tolist()
            assert np.abs(mine.rollout_logprobs - other.rollout_logprobs).max() < 1e-4
            ids, others = (np.sort(c.trace.expert_ids[:-1]) for c in (mine, other))
            assert (ids == others).all()
    assert [c.token_ids.tolist() for c in completions(before)] != [
        c.token_ids.tolist() for c in completions(after)
    ]


def completions(groups):
    return [c for group in groups for c in group.completions]
