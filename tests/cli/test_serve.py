"""`moe-replay serve`: what it refuses, and a real one in a process of its own."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
from moe_replay.testing.tiny_models import write_tiny_checkpoint

TOKEN = "0123456789abcdef"
START_S = 120.0


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


@contextmanager
def serving(model: Path, *options: str) -> Iterator[str]:
    """Run `moe-replay serve` and yield its URL once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moe_replay.cli.main", "serve", str(model)]
    command += ["--port", str(port), "--dtype", "float32", *options]
    with subprocess.Popen(command) as server:
        try:
            deadline = time.monotonic() + START_S
            while True:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert server.poll() is None, "the server ended"
                assert time.monotonic() < deadline, "the server does not start"
                server_waits(server)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def server_waits(server: subprocess.Popen[bytes]) -> None:
    """Give the server half a second, less if it ends."""
    try:
        server.wait(timeout=0.5)
    except subprocess.TimeoutExpired:
        return


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
    options = ["--token-file", str(token_file), "--kv-cache-gib", "0.05"]
    with serving(first, *options) as url:
        engine = ServerEngine(
            [url],
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
            [url],
            facts=read_facts(first),
            run="x",
            dtype="float32",
            record_routes=True,
            token=TOKEN,
        )
