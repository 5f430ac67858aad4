"""Calls to one server: what arrives is told as it arrives, and every refusal has its error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from moe_replay.errors import EngineError, RecipeError
from moe_replay.rollout.http_calls import CallError, Fault, HttpCalls
from moe_replay.testing.served import listening

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
