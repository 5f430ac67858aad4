"""`moe-replay serve`: what it refuses, and a real one in a process of its own."""

from __future__ import annotations

import numpy as np
import pytest

from moe_replay.cli.main import main
from moe_replay.cli.serve import check_exposure
from moe_replay.errors import EngineError, RecipeError
from moe_replay.rollout.bearer import read_token
from moe_replay.rollout.embedded import EmbeddedEngine
from moe_replay.rollout.model_facts import checkpoint_tensors, read_facts
from moe_replay.rollout.server_engine import ServerEngine
from moe_replay.rollout.types import Request, SamplingParams
from moe_replay.testing.served import ServerProcess
from moe_replay.testing.tiny_models import write_tiny_checkpoint

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


@pytest.mark.slow
@pytest.mark.vllm
def test_a_served_vllm_samples_and_takes_weights(tmp_path):
    first = write_tiny_checkpoint(tmp_path / "first", seed=0, num_hidden_layers=2)
    second = write_tiny_checkpoint(tmp_path / "second", seed=1, num_hidden_layers=2)
    token_file = tmp_path / "token"
    token_file.write_text(TOKEN)
    requests = [
        Request(request_id=number, prompt_ids=np.arange(5, 15, dtype=np.int32), num_generations=2)
        for number in range(3)
    ]
    sampling = SamplingParams(max_completion_length=12, temperature=0.9, seed=2)
    embedded = EmbeddedEngine(second, dtype="float32")
    expected = embedded.generate(requests, sampling)
    options = ["--dtype", "float32", "--token-file", str(token_file), "--kv-cache-gib", "0.05"]
    with ServerProcess(first, *options) as server:
        server.wait()
        engine = ServerEngine(
            [server.url],
            facts=read_facts(first),
            run="cli",
            dtype="float32",
            record_routes=True,
            token=TOKEN,
        )
        before = engine.generate(requests, sampling)
        engine.load_weights(checkpoint_tensors(second), policy_version=1)
        after = engine.generate(requests, sampling)
        engine.close()

    def tokens(groups):
        return [c.token_ids.tolist() for group in groups for c in group.completions]

    assert tokens(before) != tokens(expected)
    assert tokens(after) == tokens(expected)
    with pytest.raises(EngineError):
        ServerEngine(
            [server.url],
            facts=read_facts(first),
            run="x",
            dtype="float32",
            record_routes=True,
            token=TOKEN,
        )
