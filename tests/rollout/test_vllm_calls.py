"""Plain vLLM servers: told apart from ours, asked before the first step, and a real one in a process of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_replay.errors import EngineError, RecipeError
from moe_replay.rollout.embedded import EmbeddedEngine
from moe_replay.rollout.http_calls import Fault
from moe_replay.rollout.model_facts import checkpoint_tensors, read_facts
from moe_replay.rollout.server_calls import ServerCalls
from moe_replay.rollout.server_engine import ServerEngine
from moe_replay.rollout.types import Request, SamplingParams
from moe_replay.rollout.vllm_calls import VllmCalls, connect_vllm
from moe_replay.rollout.vllm_http import PROCESSOR
from moe_replay.testing.served import ServerProcess, listening, served
from moe_replay.testing.tiny_models import write_tiny_checkpoint

from .server_case import FACTS, fake

pytestmark = pytest.mark.vllm

LIMITS = {"token": None, "timeout_s": 300.0, "max_answer_bytes": 1 << 20}


def only(*paths: str) -> Any:
    """Return an application that knows these paths and nothing else."""
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def answer(request: Any) -> Any:
        return JSONResponse({"version": "0.30.0"})

    return Starlette(routes=[Route(path, answer, methods=["GET", "POST"]) for path in paths])


def test_our_servers_and_plain_ones_are_told_apart():
    with served(fake()) as ours, listening(only("/version")) as plain:
        kinds = [connect_vllm(url, facts=FACTS, **LIMITS) for url in (ours, plain)]
        assert [type(kind) for kind in kinds] == [ServerCalls, VllmCalls]
        for kind in kinds:
            kind.close()


@pytest.mark.parametrize(
    ("paths", "remedy"),
    [
        (["/version"], "VLLM_SERVER_DEV_MODE=1"),
        (["/version", "/server_info"], "vLLM 0.30"),
        (["/version", "/server_info", "/weight_info"], "--enable-scale-out"),
    ],
)
def test_what_a_plain_server_was_started_without_is_named(paths, remedy):
    with listening(only(*paths)) as url:
        calls = VllmCalls(url, facts=FACTS, **LIMITS)
        with pytest.raises(RecipeError, match=remedy):
            calls.status()
        calls.close()


@contextmanager
def plain_vllm(model: Path) -> Iterator[str]:
    """Run vLLM's own server with everything that replay needs, and yield its URL once it answers."""
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    options = ["--host", "127.0.0.1", "--dtype", "float32", "--skip-tokenizer-init"]
    options += ["--enforce-eager"]
    options += ["--enable-return-routed-experts", "--enable-scale-out", "--no-async-scheduling"]
    options += ["--logits-processors", PROCESSOR, "--logprobs-mode", "processed_logits"]
    options += ["--block-size", "32", "--max-num-seqs", "16"]
    options += ["--kv-cache-memory-bytes", "50000000"]
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    with ServerProcess(model, *options, program=program, environment=environment) as server:
        server.wait()
        yield server.url


@pytest.mark.slow
def test_a_plain_vllm_server_samples_and_takes_weights(tmp_path):
    models = [
        write_tiny_checkpoint(
            tmp_path / str(seed), seed=seed, num_hidden_layers=3, mlp_only_layers=[1]
        )
        for seed in (0, 1)
    ]
    requests = [
        Request(request_id=number, prompt_ids=np.arange(5, 45, dtype=np.int32), num_generations=3)
        for number in range(3)
    ]
    sampling = SamplingParams(max_completion_length=12, temperature=0.9, top_k=20, seed=2)
    expected = [EmbeddedEngine(m, dtype="float32").generate(requests, sampling) for m in models]
    facts = read_facts(models[0])
    with plain_vllm(models[0]) as url:
        engine, other = (
            ServerEngine(
                [url],
                facts=facts,
                run=run,
                dtype="float32",
                record_routes=True,
                connect=partial(connect_vllm, facts=facts),
                weights_dir=tmp_path,
            )
            for run in ("first", "second")
        )
        before = engine.generate(requests, sampling)
        engine.load_weights(checkpoint_tensors(models[1]), policy_version=1)
        after = engine.generate(requests, sampling)
        with pytest.raises(EngineError, match="policy version 1 of first"):
            other.generate(requests, sampling)
        assert other.faults[Fault.STALE] >= 1
        engine.close(), other.close()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("moe-replay")] == []
    for groups, right in zip((before, after), expected, strict=True):
        for ours, theirs in zip(groups, right, strict=True):
            for a, b in zip(ours.completions, theirs.completions, strict=True):
                assert a.token_ids.tolist() == b.token_ids.tolist()
                assert np.abs(a.rollout_logprobs - b.rollout_logprobs).max() < 1e-5
                rows = a.trace.valid
                assert (rows == b.trace.valid).all()
                same = np.sort(a.trace.expert_ids[rows]) == np.sort(b.trace.expert_ids[rows])
                assert same.all()
    assert {c.policy_version for g in after for c in g.completions} == {1}
