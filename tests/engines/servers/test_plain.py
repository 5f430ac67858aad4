"""Servers with their own noise: no answer silently replaced by another draw, or awaited in vain."""

from __future__ import annotations

import json
import threading
from collections.abc import Awaitable, Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from starlette.responses import JSONResponse, Response

from moe_replay.engines.servers.contract import Ask
from moe_replay.engines.servers.engine import ServerEngine
from moe_replay.engines.servers.faults import CallError, Fault
from moe_replay.engines.servers.sglang import SglangCalls
from moe_replay.engines.types import SamplingParams
from moe_replay.errors import EngineError

from ...support.rounds import asking_all
from ...support.served import listening
from ...support.sglang_like import SglangLike
from ..server_case import FACTS, LIMIT_S, client, fake, requests, tokens

pytestmark = pytest.mark.vllm

SAMPLING = SamplingParams(max_completion_length=64, seed=3)
# Lengths of the fake engine: mean 31.4, standard deviation 21.8, median 27.
LONG = 32
TRIAL = 1
"""Length that the trial before the first step asks for."""


class Own(SglangLike):
    """A server with its own noise; ``answer`` decides the fate of a completion by its length."""

    def __init__(self, answer: Callable[[int, Response], Awaitable[Response]]) -> None:
        options = {"enable_deterministic_inference": False}
        super().__init__(fake(), num_decoder_layers=2, options=options)
        self._become = answer
        self.lengths: list[int] = []
        """Of every completion that was drawn, also of those that never arrived."""

    async def _generate(self, request: Any) -> Response:
        response = await super()._generate(request)
        asked = json.loads(await request.body())["sampling_params"]
        if asked["max_new_tokens"] == TRIAL:
            return response
        length = len(json.loads(bytes(response.body))["output_ids"])
        self.lengths.append(length)
        return await self._become(length, response)


def engine_of(*urls: str, connect: Any = SglangCalls, **options: Any) -> ServerEngine:
    return client(*urls, connect=partial(connect, facts=FACTS), **options)


def lengths_of(groups: Any) -> list[int]:
    return [len(c.token_ids) for group in groups for c in group.completions]


@cache
def own_lengths() -> list[int]:
    return lengths_of(fake().generate(requests(150), SAMPLING))


def sigmas_from_the_policy(lengths: list[int]) -> float:
    """Return how many standard errors the mean length lies below that of the engine's own."""
    own = own_lengths()
    error = float(np.std(own)) * (1 / len(lengths) + 1 / len(own)) ** 0.5
    return (float(np.mean(own)) - float(np.mean(lengths))) / error


def test_e2_a_server_that_answers_slowly_for_long_completions_gives_unbiased_lengths():
    """Long completions take longer than the limit, which is one of silence."""

    async def slow_if_long(length: int, response: Response) -> Response:
        await anyio.sleep(15.0 if length > LONG else 0.0)
        return response

    server = Own(slow_if_long)
    with listening(server.application()) as url:
        engine = engine_of(url, timeout_s=12.0, calls_per_server=24)
        lengths = lengths_of(engine.generate(requests(24), SAMPLING))
        faults = engine.faults
        engine.close()
    assert sum(faults.values()) == 0
    assert sorted(lengths) == sorted(server.lengths)
    assert max(lengths) > LONG and abs(sigmas_from_the_policy(lengths)) < 4


class LimitsAnswers(SglangCalls):
    """What this client did once: an answer that takes too long is asked for again."""

    async def _waited(self, path: str, body: bytes) -> bytes:
        code, answer = await self._answer("POST", path, body, silence_s=self._timeout_s)
        return self._good(code, answer, path)


class Careless(LimitsAnswers):
    """Takes another draw for the same one."""

    def biases(self, error: CallError) -> bool:
        return False


async def never_if_long(length: int, response: Response) -> Response:
    await anyio.sleep(3600.0 if length > LONG else 0.0)
    return response


def test_e2_a_limit_on_the_answer_leaves_the_short_ones():
    """The control: the same arithmetic finds the bias of a client that limits answers."""
    server = Own(never_if_long)
    with listening(server.application()) as url:
        engine = engine_of(
            url, connect=Careless, timeout_s=0.5, calls_per_server=24, max_attempts=1000
        )
        lengths = lengths_of(engine.generate(requests(24), SAMPLING))
        assert engine.faults["slow"] >= 8
        engine.close()
    assert max(lengths) <= LONG and sigmas_from_the_policy(lengths) > 4


def test_e2_too_many_draws_by_other_noise_stop_the_run_by_name():
    server = Own(never_if_long)
    with listening(server.application()) as url:
        engine = engine_of(
            url, connect=LimitsAnswers, timeout_s=0.5, calls_per_server=24, max_attempts=1000
        )
        with pytest.raises(
            EngineError, match=r"drawn again by other noise.*slow \d+.*deterministic-inference"
        ):
            engine.generate(requests(24), SAMPLING)
        engine.close()


def test_e2_a_completion_that_fails_is_drawn_again_alone_and_counted():
    """One of twelve fails once; the other eleven are neither lost nor drawn again."""
    failed = []

    async def fail_once(length: int, response: Response) -> Response:
        if failed:
            return response
        failed.append(length)
        return JSONResponse({"error": "out of memory"}, 500)

    server = Own(fail_once)
    with listening(server.application()) as url:
        engine = engine_of(url)
        lengths = lengths_of(engine.generate(requests(6), SAMPLING))
        faults = engine.faults
        engine.close()
    assert len(lengths) == 12 and len(server.lengths) == 13
    assert sorted([*lengths, *failed]) == sorted(server.lengths)
    assert faults["failed"] == faults["redrawn"] == 1


def test_e2_a_server_that_falls_silent_is_one_incident_and_the_other_does_its_work():
    """Nothing comes from it, not even an answer to whether it lives."""
    is_silent = threading.Event()

    class Hanging(Own):
        async def _health(self, request: Any) -> Response:
            await anyio.sleep(3600.0 if is_silent.is_set() else 0.0)
            return await super()._health(request)

    async def hang(length: int, response: Response) -> Response:
        is_silent.set()
        await anyio.sleep(3600.0)
        return response

    async def answer(length: int, response: Response) -> Response:
        return response

    hanging, working = Hanging(hang), Own(answer)
    with listening(hanging.application()) as first, listening(working.application()) as second:
        engine = asking_all(engine_of(first, second, timeout_s=10.0, calls_per_server=16))
        groups = engine.generate(requests(24), SAMPLING)
        faults = engine.faults
        engine.close()
    assert {c.server for group in groups for c in group.completions} == {second}
    assert faults["slow"] >= 1
    # 16 calls ended with one silence; drawn again is what hung, without a choice by length.
    assert 1 <= faults["redrawn"] <= 8


def test_e3_a_round_that_is_given_up_is_aborted_in_the_server():
    started, aborted = threading.Semaphore(0), threading.Semaphore(0)

    async def hold(length: int, response: Response) -> Response:
        started.release()
        await anyio.sleep(3600.0)
        return response

    class SlowToHear(Own):
        async def _abort(self, request: Any) -> Response:
            # Longer than the pauses between two looks at whether all calls have ended.
            await anyio.sleep(0.3)
            response = await super()._abort(request)
            aborted.release()
            return response

    server = SlowToHear(hold)
    with listening(server.application()) as url:
        engine = engine_of(url, calls_per_server=3)
        raised: list[EngineError] = []

        def run() -> None:
            try:
                engine.generate(requests(3), SAMPLING)
            except EngineError as error:
                raised.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        for _ in range(6):
            started.acquire()
        engine._servers[0].give_up()
        thread.join()
        assert "given up" in str(raised[0])
        # A busy server may hear of it after its caller has stopped waiting for its word.
        for _ in range(6):
            assert aborted.acquire(timeout=LIMIT_S)
        assert len(server.aborted) == 6 == len(set(server.aborted))
        engine.close()


class SlowToAbort(SglangCalls):
    """A client whose word to the server takes longer than its caller waits for it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.aborting = threading.Semaphore(0)

    async def _answer(self, method: str, path: str, *rest: Any, **options: Any) -> Any:
        if path == "/abort_request":
            self.aborting.release()
            await anyio.sleep(0.2)
        return await super()._answer(method, path, *rest, **options)


def test_e3_a_call_that_is_given_up_twice_is_still_aborted():
    """By the round, and by the caller who stops waiting for it while the abort is on its way."""
    started = threading.Semaphore(0)

    async def hold(length: int, response: Response) -> Response:
        started.release()
        await anyio.sleep(3600.0)
        return response

    server = Own(hold)
    with listening(server.application()) as url:
        calls = SlowToAbort(
            url, facts=FACTS, token=None, timeout_s=LIMIT_S, max_answer_bytes=1 << 20
        )
        (request,) = requests(1)
        status = calls.status()
        ask = Ask(
            request=request,
            numbers=(0,),
            sampling=SAMPLING,
            policy=status.policy,
            description=status.description,
        )
        message = calls._message(ask, 0)
        running = calls.begin(calls._answer_to(message))
        assert started.acquire(timeout=LIMIT_S)
        calls.give_up()
        assert calls.aborting.acquire(timeout=LIMIT_S)
        running.cancel()
        calls.close()
        assert server.aborted == [message["rid"]]


def test_e8_a_server_with_other_weights_of_the_same_shape_answers_by_ours(tmp_path):
    """It was started with a checkpoint that differs only in its values; one of two servers."""
    from moe_replay.checkpoint.facts import read_facts
    from moe_replay.engines.embedded.engine import EmbeddedEngine
    from moe_replay.testing.tiny_models import write_tiny_checkpoint

    ours, other = (write_tiny_checkpoint(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    facts = read_facts(ours)
    sampling = SamplingParams(max_completion_length=6, seed=3)
    wanted = requests(2)

    def application(model: Path) -> Any:
        engine = EmbeddedEngine(model, dtype="float32")
        return SglangLike(engine, num_decoder_layers=facts.routed.num_decoder_layers).application()

    def engine_at(*urls: str) -> ServerEngine:
        connect = partial(SglangCalls, facts=facts)
        return client(*urls, facts=facts, connect=connect, weights_dir=tmp_path)

    def answers(url: str) -> list[list[int]]:
        engine = engine_at(url)
        groups = engine.generate(wanted, sampling)
        engine.close()
        return tokens(groups)

    with listening(application(ours)) as first, listening(application(other)) as second:
        right = answers(first)
        assert answers(second) != right
        both = engine_at(first, second)
        both.restore(ours)
        assert answers(first) == answers(second) == right
        both.close()


def test_a_server_whose_faults_are_counted_names_them():
    assert {kind.value for kind in Fault} < {*client_faults()}


def client_faults() -> list[str]:
    with listening(SglangLike(fake(), num_decoder_layers=2).application()) as url:
        engine = engine_of(url)
        names = [*engine.faults]
        engine.close()
    return names
