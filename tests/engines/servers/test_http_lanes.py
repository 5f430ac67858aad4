"""Connections to a server: one a call in flight, reused by the next, and never one that is gone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from moe_replay.engines.servers.faults import CallError, Fault
from moe_replay.engines.servers.http import HttpCalls

from ...support.served import listening
from ..server_case import opened

pytestmark = pytest.mark.vllm


class Counting:
    """Notes calls' connections; /hold waits for `release`, /close and /cut end the connection.

    The status code is that of a path such as /500.
    """

    def __init__(self) -> None:
        self.ports: list[int] = []
        self.came, self.release = threading.Semaphore(0), threading.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        import anyio

        if scope["type"] != "http":
            return
        self.ports.append(scope["client"][1])
        self.came.release()
        if scope["path"] == "/hold":
            await anyio.to_thread.run_sync(self.release.wait)
        headers = [(b"connection", b"close")] if scope["path"] == "/close" else []
        status = int(code) if (code := scope["path"][1:]).isdecimal() else 200
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"here", "more_body": True})
        if scope["path"] == "/cut":
            raise RuntimeError("the answer ends here")
        await send({"type": "http.response.body", "body": b""})


def calls_to(url: str) -> HttpCalls:
    return opened(HttpCalls(url, token=None, timeout_s=300.0, max_answer_bytes=1 << 20))


def test_calls_one_after_another_share_a_connection_and_calls_at_once_do_not():
    server = Counting()
    with listening(server) as url, ThreadPoolExecutor(3) as threads:
        calls = calls_to(url)
        for _ in range(3):
            assert calls.call("GET", "/") == b"here"
        assert len(set(server.ports)) == 1
        held = [threads.submit(calls.call, "GET", "/hold") for _ in range(3)]
        for _ in range(6):
            server.came.acquire()
        assert len(set(server.ports[3:])) == 3
        server.release.set()
        assert [call.result() for call in held] == [b"here"] * 3
        # None of the three has to open another.
        again = [threads.submit(calls.call, "GET", "/hold") for _ in range(3)]
        assert [call.result() for call in again] == [b"here"] * 3
        calls.close()
    assert set(server.ports[6:]) <= set(server.ports[3:6])


@pytest.mark.parametrize("path", ["/close", "/"])
def test_a_connection_that_the_server_has_closed_is_not_used_again(path):
    """The control keeps it."""
    server = Counting()
    with listening(server) as url:
        calls = calls_to(url)
        assert [calls.call("GET", path) for _ in range(3)] == [b"here"] * 3
        calls.close()
    assert len(set(server.ports)) == (3 if path == "/close" else 1)


@pytest.mark.parametrize(("status", "num_connections"), [(500, 2), (409, 1)])
def test_a_connection_is_not_used_again_after_an_error_of_the_server(status, num_connections):
    """It may be closing it; the control is an error of the caller."""
    server = Counting()
    with listening(server) as url:
        calls = calls_to(url)
        assert calls.exchange("GET", f"/{status}") == (status, b"here")
        assert calls.call("GET", "/") == b"here"
        calls.close()
    assert len(set(server.ports)) == num_connections


def test_a_call_works_after_one_whose_answer_was_cut():
    server = Counting()
    with listening(server) as url:
        calls = calls_to(url)
        with pytest.raises(CallError) as raised:
            calls.call("GET", "/cut")
        assert raised.value.fault is Fault.UNREACHABLE
        assert calls.call("GET", "/") == b"here"
        calls.close()
    assert len(set(server.ports)) == 2


@pytest.mark.parametrize(
    ("user", "token", "sent"),
    [
        ("me:p%40ss@", None, b"Basic bWU6cEBzcw=="),
        ("me:p%40ss@", "t" * 32, b"Basic bWU6cEBzcw=="),
        ("", "t" * 32, b"Bearer " + b"t" * 32),
        ("", None, None),
    ],
)
def test_the_path_and_the_credentials_of_an_address_go_with_every_call(user, token, sent):
    seen: list[Any] = []

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            seen.append((scope["path"], scope["query_string"], headers.get(b"authorization")))
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

    with listening(answer) as url:
        address = url.replace("//", f"//{user}") + "/below/"
        calls = opened(HttpCalls(address, token=token, timeout_s=300.0, max_answer_bytes=1 << 20))
        calls.call("PUT", "/part?offset=1", b"x")
        calls.close()
    assert seen == [("/below/part", b"offset=1", sent)]


@pytest.mark.parametrize("address", ["ftp://127.0.0.1:9", "127.0.0.1:9/x"])
def test_an_address_that_is_not_of_http_is_unreachable(address):
    calls = calls_to(address)
    with pytest.raises(CallError, match="expected http or https") as raised:
        calls.call("GET", "/")
    assert raised.value.fault is Fault.UNREACHABLE
    calls.close()
