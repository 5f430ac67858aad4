"""Plain vLLM servers: told apart from ours, asked before the first step, and a real one in a process of its own."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from moe_replay.errors import EngineError, RecipeError
from moe_replay.rollout.embedded import EmbeddedEngine
from moe_replay.rollout.http_calls import Fault
from moe_replay.rollout.model_facts import ModelFacts, checkpoint_tensors, read_facts
from moe_replay.rollout.server_calls import ServerCalls
from moe_replay.rollout.server_engine import ServerEngine
from moe_replay.rollout.server_messages import PolicyName
from moe_replay.rollout.types import Request, RolloutGroup, SamplingParams
from moe_replay.rollout.vllm_calls import VllmCalls, connect_vllm
from moe_replay.rollout.vllm_http import PROCESSOR
from moe_replay.testing.served import ServerProcess, listening, served
from moe_replay.testing.tiny_models import write_tiny_checkpoint

from .server_case import FACTS, fake

pytestmark = pytest.mark.vllm

LIMITS = {"token": None, "timeout_s": 300.0, "max_answer_bytes": 1 << 20}


def only(*paths: str) -> Any:
    """Return an application that knows these paths and nothing else."""

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


def test_e2_a_plain_server_shows_life_by_the_tokens_that_it_counts():
    counted = iter(["5.0", "5.0", "6.0", ""])

    async def answer(request: Any) -> Any:
        number = next(counted)
        line = f'vllm:generation_tokens_total{{engine="0"}} {number}\n' if number else ""
        return PlainTextResponse(f"# HELP a word\n{line}python_gc_objects_total 7.0\n")

    with listening(Starlette(routes=[Route("/metrics", answer)])) as url:
        calls = VllmCalls(url, facts=FACTS, **LIMITS)
        lives = [calls.result(calls.begin(calls._shows_life())) for _ in range(3)]
        assert lives == [True, False, True] and calls._work
        calls.result(calls.begin(calls._shows_life()))
        assert not calls._work
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain:
    """A real server, and what it may be given."""

    url: str
    models: tuple[Path, Path]
    facts: ModelFacts
    folder: Path
    expected: tuple[list[RolloutGroup], list[RolloutGroup]]

    @contextmanager
    def engine(self, run: str) -> Iterator[ServerEngine]:
        engine = ServerEngine(
            [self.url],
            facts=self.facts,
            run=run,
            dtype="float32",
            record_routes=True,
            connect=partial(connect_vllm, facts=self.facts),
            weights_dir=self.folder,
        )
        try:
            yield engine
        finally:
            engine.close()


REQUESTS = [
    Request(request_id=number, prompt_ids=np.arange(5, 45, dtype=np.int32), num_generations=3)
    for number in range(3)
]
SAMPLING = SamplingParams(max_completion_length=12, temperature=0.9, top_k=20, seed=2)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plain]:
    """Return a real server of the first of two models of the same shape."""
    folder = tmp_path_factory.mktemp("plain")
    first, second = (
        write_tiny_checkpoint(
            folder / str(seed), seed=seed, num_hidden_layers=3, mlp_only_layers=[1]
        )
        for seed in (0, 1)
    )
    one, other = (
        EmbeddedEngine(model, dtype="float32").generate(REQUESTS, SAMPLING)
        for model in (first, second)
    )
    with plain_vllm(first) as url:
        yield Plain(
            url=url,
            models=(first, second),
            facts=read_facts(first),
            folder=tmp_path_factory.mktemp("weights"),
            expected=(one, other),
        )


def assert_same(groups: list[RolloutGroup], right: list[RolloutGroup]) -> None:
    for ours, theirs in zip(groups, right, strict=True):
        for a, b in zip(ours.completions, theirs.completions, strict=True):
            assert a.token_ids.tolist() == b.token_ids.tolist()
            assert np.abs(a.rollout_logprobs - b.rollout_logprobs).max() < 1e-5
            rows = a.trace.valid
            assert (rows == b.trace.valid).all()
            same = np.sort(a.trace.expert_ids[rows]) == np.sort(b.trace.expert_ids[rows])
            assert same.all()


@pytest.mark.slow
def test_a_plain_vllm_server_samples_and_takes_weights(plain):
    with plain.engine("first") as engine, plain.engine("second") as other:
        assert_same(engine.generate(REQUESTS, SAMPLING), plain.expected[0])
        engine.load_weights(checkpoint_tensors(plain.models[1]), policy_version=1)
        after = engine.generate(REQUESTS, SAMPLING)
        assert_same(after, plain.expected[1])
        assert {c.policy_version for g in after for c in g.completions} == {1}
        with pytest.raises(EngineError, match="policy version 1 of first"):
            other.generate(REQUESTS, SAMPLING)
        assert other.faults[Fault.STALE] >= 1
    assert list(plain.folder.iterdir()) == []


@pytest.mark.slow
def test_e8_a_plain_server_with_other_weights_answers_by_ours_after_the_start(plain):
    with plain.engine("before") as engine:
        engine.load_weights(checkpoint_tensors(plain.models[1]), policy_version=0)
        assert_same(engine.generate(REQUESTS, SAMPLING), plain.expected[1])
    with plain.engine("after") as engine:
        engine.restore(plain.models[0])
        assert_same(engine.generate(REQUESTS, SAMPLING), plain.expected[0])


def num_running(calls: VllmCalls) -> float:
    text = calls.call("GET", "/metrics").decode()
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith(("vllm:num_requests_running{", "vllm:num_requests_waiting{"))
    )


@pytest.mark.slow
def test_e2_e3_a_plain_server_shows_that_it_works_and_cancels_what_is_given_up(plain):
    """Long completions: while they are sampled its counters move, and none is left when the round is given up."""
    long = SamplingParams(
        max_completion_length=plain.facts.max_context_length - 40, temperature=5.0, seed=1
    )
    # Many of them, because the end-of-sequence token may come early: some run when the server is looked at.
    many = [replace(request, num_generations=64) for request in REQUESTS]
    with plain.engine("long") as engine, ThreadPoolExecutor(1) as thread:
        engine.restore(plain.models[0])
        (calls,) = engine._servers
        lives = lambda: calls.result(calls.begin(calls._shows_life()))  # noqa: E731
        lives()
        work = thread.submit(engine.generate, many, long)
        while not num_running(calls):
            assert not work.done()
        calls.give_up()
        with pytest.raises(EngineError, match="given up"):
            work.result()
        while num_running(calls):
            continue
        assert lives(), "tokens were sampled since it was asked first"
        assert not lives() and calls.is_up()


@pytest.mark.slow
def test_e24_a_push_that_failed_breaks_a_plain_server_until_it_is_started_again(plain):
    """The server cannot read the files. The last of these tests: nothing works there any more."""
    with plain.engine("broken") as engine:
        engine.restore(plain.models[0])
        (calls,) = engine._servers
        commit = calls.commit_weights

        def lose_files(policy: PolicyName) -> None:
            shutil.rmtree(calls._pushed)
            commit(policy)

        calls.commit_weights = lose_files
        with pytest.raises(EngineError, match=r"rollout\.weights_dir.*[Ss]tart the server again"):
            engine.load_weights(checkpoint_tensors(plain.models[1]), policy_version=1)
        calls.commit_weights = commit
        with pytest.raises(EngineError, match="another push, or has failed to"):
            engine.load_weights(checkpoint_tensors(plain.models[1]), policy_version=1)
        with pytest.raises(EngineError, match="no server is"):
            engine.generate(REQUESTS, SAMPLING)
