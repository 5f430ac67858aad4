"""What a caller may hold of a rollout server: not for ever, and not without end."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from urllib.parse import urlsplit

import httpx2
import pytest

from moe_replay.engines.serve.access import Bodies
from moe_replay.engines.serve.messages import call_bytes

from ...support.served import served
from ..server_case import (
    FACTS,
    HEADERS,
    LIMIT_S,
    POLICY,
    SAMPLING,
    HeldEngine,
    call,
    error_of,
    fake,
    requests,
)

pytestmark = pytest.mark.vllm
HEAD = "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-moe-replay\r\n"


def connected(url: str) -> socket.socket:
    address = urlsplit(url)
    connection = socket.create_connection((address.hostname, address.port), timeout=LIMIT_S)
    connection.settimeout(LIMIT_S)
    return connection


def eventually(call_again: Callable[[], bool]) -> bool:
    """Call until it is true: a caller that this machine keeps waiting meets a short limit too."""
    deadline = time.monotonic() + LIMIT_S
    while not (is_good := call_again()) and time.monotonic() < deadline:
        continue
    return is_good


def answers(url: str) -> bool:
    try:
        return call("GET", f"{url}/status").status_code == 200
    except httpx2.TransportError:
        return False


def all_of(connection: socket.socket) -> bytes:
    """Return what comes until the other side closes."""
    answer = b""
    try:
        while piece := connection.recv(1 << 16):
            answer += piece
    except ConnectionResetError:
        pass
    return answer


def test_r9_a_body_that_stops_coming_is_refused_and_a_whole_one_is_taken():
    with served(fake(), facts=FACTS, bodies=Bodies(body_s=0.2)) as url:
        with connected(url) as stalled:
            stalled.sendall(f"{HEAD}Content-Length: 100\r\nConnection: close\r\n\r\nhalf".encode())
            answer = all_of(stalled)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"stopped coming: 4 bytes" in answer
        body = call_bytes(requests(), SAMPLING, POLICY)
        assert eventually(lambda: error_of(call("POST", f"{url}/generate", body)) == (200, ""))


@pytest.mark.parametrize("http", ["h11", "httptools"])
@pytest.mark.parametrize("sent", ["", "POST /generate HTT", HEAD])
def test_r9_headers_that_do_not_come_end_the_connection(sent, http):
    with served(fake(), facts=FACTS, web={"headers_s": 0.2, "http": http}) as url:
        with connected(url) as slow:
            slow.sendall(sent.encode())
            assert all_of(slow) == b""
        assert eventually(lambda: answers(url))


def test_r9_a_second_request_has_a_limit_for_its_headers_too():
    with served(fake(), facts=FACTS, web={"headers_s": 5.0}) as url, connected(url) as slow:
        slow.sendall(b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert slow.recv(12) == b"HTTP/1.1 200"
        slow.sendall(b"GET /status HTT")
        assert b"HTTP/1.1" not in all_of(slow)


@pytest.mark.parametrize("http", ["h11", "httptools"])
def test_r9_a_slow_answer_is_not_cut_by_the_limit_for_headers(http):
    engine = HeldEngine()
    web = {"headers_s": 5.0, "http": http}
    with served(engine, facts=FACTS, progress_s=0.6, web=web) as url:
        body = call_bytes(requests(1), SAMPLING, POLICY)
        seen = 0
        with httpx2.stream(
            "POST", f"{url}/generate", content=body, headers=HEADERS, timeout=LIMIT_S
        ) as answer:
            for _ in answer.iter_raw():
                seen += 1
                if seen == 10:  # 6 s at least
                    engine.release()
        assert seen > 10


def test_r9_more_connections_than_the_bound_are_refused():
    with served(fake(), facts=FACTS, web={"max_connections": 3}) as url:
        held = [connected(url) for _ in range(3)]
        for connection in held:
            connection.sendall(b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(12) == b"HTTP/1.1 200"
        with connected(url) as further:
            assert all_of(further) == b""
        held.pop().close()
        # Its place is free once the server has seen that it left.
        while True:
            with connected(url) as further:
                further.sendall(
                    b"GET /status HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
                )
                if all_of(further).startswith(b"HTTP/1.1 200"):
                    break
        for connection in held:
            connection.close()


def test_r9_a_client_that_leaves_during_its_upload_is_one_line(caplog):
    with served(fake(), facts=FACTS) as url:
        for _ in range(5):
            with connected(url) as leaving:
                leaving.sendall(f"{HEAD}Content-Length: 100\r\n\r\nhalf".encode())
        assert call("GET", f"{url}/status").status_code == 200
        while len(caplog.records) < 5:
            call("GET", f"{url}/status")
    assert {record.getMessage() for record in caplog.records} == {
        "127.0.0.1 left while it sent /generate"
    }
    assert all(record.exc_info is None for record in caplog.records)


def test_e3_a_client_that_leaves_cancels_its_completions_and_no_other(caplog):
    engine = HeldEngine()
    with served(engine, facts=FACTS, progress_s=0.02) as url:
        body = call_bytes(requests(3), SAMPLING, POLICY)
        staying = call_bytes(requests(1, first=50), SAMPLING, POLICY)
        with httpx2.stream(
            "POST", f"{url}/generate", content=staying, headers=HEADERS, timeout=LIMIT_S
        ) as other:
            engine.wait_for(lambda: engine.num_running == 2)
            with httpx2.stream(
                "POST", f"{url}/generate", content=body, headers=HEADERS, timeout=LIMIT_S
            ) as answer:
                engine.wait_for(lambda: engine.num_running == 8)
                next(answer.iter_raw())
            engine.wait_for(lambda: engine.num_running == 2)
            assert engine.num_cancelled == 6
            engine.release()
            other.read()
            assert error_of(other) == (200, "")
        assert engine.num_cancelled == 6
    assert [r.getMessage().partition(" ")[2] for r in caplog.records] == ["left during /generate"]


def test_r9_the_end_of_a_server_is_told_to_those_who_wait():
    engine = HeldEngine()
    body = call_bytes(requests(1), SAMPLING, POLICY)
    with ExitStack() as ending:
        url = ending.enter_context(served(engine, facts=FACTS, progress_s=0.02))
        with (
            httpx2.stream(
                "POST", f"{url}/generate", content=body, headers=HEADERS, timeout=LIMIT_S
            ) as waiting,
            connected(url) as stalled,
        ):
            engine.wait_for(lambda: engine.num_running == 2)
            stalled.sendall(f"{HEAD}Content-Length: 100\r\n\r\nhalf".encode())
            # Its upload has begun when a call that came later is answered.
            assert call("GET", f"{url}/status").status_code == 200
            ending.close()
            waiting.read()
            assert error_of(waiting) == (503, "the server is stopping")
            assert all_of(stalled).startswith(b"HTTP/1.1 503")
    assert engine.num_running == 0
