"""Calls to one server: what arrives is told as it arrives, and every refusal has its error."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import anyio
import pytest

from moe_replay.engines.servers.faults import CallError, Fault, GivenUpError
from moe_replay.engines.servers.http import HttpCalls
from moe_replay.errors import EngineError, RecipeError

from ...support.served import listening

pytestmark = pytest.mark.vllm


@contextmanager
def calls_to(application: Any) -> Iterator[HttpCalls]:
    with listening(application) as url:
        calls = HttpCalls(url, token=None, timeout_s=300.0, max_answer_bytes=1 << 20)
        try:
            yield calls
        finally:
            calls.close()


def answering(status: int, *pieces: bytes) -> Any:
    async def answer(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": status, "headers": []})
            for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

    return answer


def test_e2_pieces_of_an_answer_are_told_as_they_arrive():
    told: list[bytes] = []
    with calls_to(answering(200, b"a" * 10, b"b" * 20)) as calls:
        assert calls.call("GET", "/", on_piece=told.append) == b"a" * 10 + b"b" * 20
    assert b"".join(told) == b"a" * 10 + b"b" * 20


def test_pieces_of_a_refusal_are_not_progress():
    told: list[bytes] = []
    with (
        calls_to(answering(500, b"out of memory")) as calls,
        pytest.raises(CallError, match="answers 500: out of memory"),
    ):
        calls.call("GET", "/", on_piece=told.append)
    assert told == []


@pytest.mark.parametrize(
    ("code", "kind", "fault"),
    [
        (400, EngineError, None),
        (401, RecipeError, None),
        (409, CallError, Fault.STALE),
        (413, CallError, Fault.FAILED),
        (422, EngineError, None),
        (500, CallError, Fault.FAILED),
    ],
)
def test_a_refusal_inside_of_a_stream_is_that_of_a_status_code(code, kind, fault):
    with calls_to(answering(code, b"why")) as calls:
        with pytest.raises((EngineError, RecipeError)) as raised:
            calls.call("GET", "/generate")
        inside = calls.refusal(code, "why", "/generate")
    assert type(inside) is type(raised.value) is kind
    assert str(inside) == str(raised.value)
    assert getattr(inside, "fault", None) is getattr(raised.value, "fault", None) is fault


class Holding:
    """A server that holds every call to /hold until its client leaves, and answers others."""

    def __init__(self) -> None:
        self.came, self.left = threading.Semaphore(0), threading.Semaphore(0)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] == "/hold":
            self.came.release()
            while (await receive())["type"] != "http.disconnect":
                continue
            self.left.release()
        else:
            await answering(200, b"here")(scope, receive, send)


def test_e3_calls_that_are_given_up_close_their_connections():
    """All three of them, and the next call works."""
    server = Holding()
    with calls_to(server) as calls, ThreadPoolExecutor(3) as threads:
        held = [threads.submit(calls.call, "GET", "/hold") for _ in range(3)]
        for _ in held:
            server.came.acquire()
        assert calls.call("GET", "/other") == b"here"
        calls.give_up()
        for call in held:
            with pytest.raises(GivenUpError):
                call.result()
            server.left.acquire()
        assert calls.call("GET", "/other") == b"here"


def test_e3_closing_gives_up_what_is_under_way():
    server = Holding()
    with calls_to(server) as calls, ThreadPoolExecutor(1) as threads:
        held = threads.submit(calls.call, "GET", "/hold")
        server.came.acquire()
        calls.close()
        with pytest.raises(GivenUpError):
            held.result()
        server.left.acquire()


def test_e3_a_caller_that_is_interrupted_gives_its_call_up():
    """Ctrl-C ends the wait in this thread; the call runs in another one."""
    server = Holding()
    with calls_to(server) as calls:
        answer = calls.begin(calls._answer("GET", "/hold", silence_s=None))
        server.came.acquire()

        class Interrupted(KeyboardInterrupt):
            pass

        def interrupt() -> None:
            raise Interrupted

        answer.result = interrupt  # type: ignore[method-assign]
        with pytest.raises(Interrupted):
            calls.result(answer)
        server.left.acquire()


def test_a_silent_server_is_slow_and_one_that_sends_pieces_is_not():
    """The same time in all; only the second is silent for longer than the limit."""

    def application(*pauses_s: float) -> Any:
        async def answer(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                return
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for pause_s in pauses_s:
                await anyio.sleep(pause_s)
                await send({"type": "http.response.body", "body": b"a", "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        return answer

    with calls_to(application(*[1.25] * 12)) as calls:
        assert calls.exchange("GET", "/", silence_s=12.5) == (200, b"a" * 12)
    with (
        calls_to(application(3600.0)) as calls,
        pytest.raises(CallError, match="no answer in time") as raised,
    ):
        calls.exchange("GET", "/", silence_s=0.5)
    assert raised.value.fault is Fault.SLOW
