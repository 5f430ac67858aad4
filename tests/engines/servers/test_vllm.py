"""Plain vLLM servers: distinguished from ours, asked at the start, and a real one as a process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from moe_replay.checkpoint.facts import checkpoint_tensors
from moe_replay.engines.serve.messages import PolicyName
from moe_replay.engines.servers.engine import ServerEngine
from moe_replay.engines.servers.faults import Fault
from moe_replay.engines.servers.own import ServerCalls
from moe_replay.engines.servers.vllm import VllmCalls, connect_vllm
from moe_replay.engines.types import SamplingParams
from moe_replay.errors import EngineError, RecipeError

from ...support.served import listening, served
from ..server_case import FACTS, fake, opened
from .plain_vllm_case import (
    LIMITS,
    REQUESTS,
    SAMPLING,
    Models,
    assert_same,
    num_running,
    onlooker,
    plain_vllm,
    write_models,
)

pytestmark = pytest.mark.vllm


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
        calls = opened(VllmCalls(url, facts=FACTS, **LIMITS))
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
        calls = opened(VllmCalls(url, facts=FACTS, **LIMITS))
        lives = [calls.result(calls.begin(calls._shows_life())) for _ in range(3)]
        assert lives == [True, False, True] and calls._work
        calls.result(calls.begin(calls._shows_life()))
        assert not calls._work
        calls.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain:
    """A real server of the first of two models."""

    url: str
    models: Models

    def engine(self, run: str) -> AbstractContextManager[ServerEngine]:
        return self.models.engine([self.url], run)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plain]:
    models = write_models(tmp_path_factory, REQUESTS)
    with plain_vllm(models.paths[0]) as server:
        server.wait()
        yield Plain(url=server.url, models=models)


@pytest.mark.slow
def test_a_plain_vllm_server_samples_and_takes_weights(plain):
    with plain.engine("first") as engine, plain.engine("second") as other:
        assert_same(engine.generate(REQUESTS, SAMPLING), plain.models.expected[0])
        engine.load_weights(checkpoint_tensors(plain.models.paths[1]), policy_version=1)
        after = engine.generate(REQUESTS, SAMPLING)
        assert_same(after, plain.models.expected[1])
        assert {c.policy_version for g in after for c in g.completions} == {1}
        with pytest.raises(EngineError, match="policy version 1 of first"):
            other.generate(REQUESTS, SAMPLING)
        assert other.faults[Fault.STALE] >= 1
    assert list(plain.models.folder.iterdir()) == []


@pytest.mark.slow
def test_e8_a_plain_server_with_other_weights_answers_by_ours_after_the_start(plain):
    with plain.engine("before") as engine:
        engine.load_weights(checkpoint_tensors(plain.models.paths[1]), policy_version=0)
        assert_same(engine.generate(REQUESTS, SAMPLING), plain.models.expected[1])
    with plain.engine("after") as engine:
        engine.restore(plain.models.paths[0])
        assert_same(engine.generate(REQUESTS, SAMPLING), plain.models.expected[0])


@pytest.mark.slow
def test_e2_e3_a_plain_server_shows_that_it_works_and_cancels_what_is_given_up(plain):
    """Its counters move while it samples, and no completion is left when the round is given up."""
    # Nothing stops them, so all fill their context: 12 rounds of 16 sequences, of which one at most
    # is over by then.
    endless = replace(plain.models, facts=replace(plain.models.facts, eos_ids=()))
    sampling = SamplingParams(max_completion_length=endless.facts.max_context_length - 40, seed=1)
    many = [replace(request, num_generations=64) for request in REQUESTS]
    with (
        endless.engine([plain.url], "long") as engine,
        # The engine's own calls look at the counters too, and would see what moved before these do.
        onlooker(plain.url, endless.facts) as calls,
        ThreadPoolExecutor(1) as thread,
    ):
        engine.restore(endless.paths[0])
        lives = lambda: calls.result(calls.begin(calls._shows_life()))  # noqa: E731
        lives()
        work = thread.submit(engine.generate, many, sampling)
        while not (num_running(calls) and lives()):
            assert not work.done()
        engine._servers[0].give_up()
        with pytest.raises(EngineError, match="given up"):
            work.result()
        while num_running(calls):
            continue
        lives()
        assert not lives() and calls.is_up()


@pytest.mark.slow
def test_e24_a_push_that_failed_breaks_a_plain_server_until_it_is_started_again(plain):
    """The server cannot read the files. The last of these tests: nothing works there any more."""
    with plain.engine("broken") as engine:
        engine.restore(plain.models.paths[0])
        (calls,) = engine._servers
        commit = calls.commit_weights

        def lose_files(policy: PolicyName) -> None:
            shutil.rmtree(calls._pushed)
            commit(policy)

        calls.commit_weights = lose_files
        with pytest.raises(EngineError, match=r"rollout\.weights_dir.*[Ss]tart the server again"):
            engine.load_weights(checkpoint_tensors(plain.models.paths[1]), policy_version=1)
        calls.commit_weights = commit
        with pytest.raises(EngineError, match="another push, or has failed to"):
            engine.load_weights(checkpoint_tensors(plain.models.paths[1]), policy_version=1)
        with pytest.raises(EngineError, match="no server is"):
            engine.generate(REQUESTS, SAMPLING)
