"""Rollout servers: whom they answer, and what they refuse."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import pytest

from moe_replay.engines.registry import EngineUse
from moe_replay.engines.serve.access import Access, RefusedError
from moe_replay.engines.serve.app import EngineServer
from moe_replay.engines.serve.messages import (
    GenerateCall,
    PolicyName,
    Progress,
    call_bytes,
    read_message,
)
from moe_replay.engines.servers import opening
from moe_replay.engines.servers.contract import Ask
from moe_replay.engines.servers.entry import check_engine
from moe_replay.engines.servers.faults import CallError, Fault
from moe_replay.engines.types import Completion
from moe_replay.errors import CodecError, RecipeError
from moe_replay.recipe.sections.rollout import ServersEngineSection

from ...support.served import listening, served
from ..server_case import (
    FACTS,
    LIMIT_S,
    POLICY,
    SAMPLING,
    HeldEngine,
    call,
    calls_to,
    client,
    error_of,
    fake,
    requests,
)

pytestmark = pytest.mark.vllm
PUSH = "0" * 32


@pytest.fixture(scope="module")
def open_url() -> Iterator[str]:
    """Return a server for all tests that leave it as it is."""
    with served(fake(), facts=FACTS) as url:
        yield url


@pytest.fixture(scope="module")
def guarded_url() -> Iterator[str]:
    """Return one that asks for a token."""
    with served(fake(), facts=FACTS, token="secret") as url:
        yield url


def generate(url: str, change: dict[str, object]) -> tuple[int, str]:
    """Make a generate call with something changed, and return the status and text of its error."""
    body = json.loads(call_bytes(requests(2), SAMPLING, POLICY))
    for path, value in change.items():
        *folders, last = path.split(".")
        place = body
        for folder in folders:
            place = place[int(folder) if folder.isdigit() else folder]
        place[last] = value
    return error_of(call("POST", f"{url}/generate", json.dumps(body).encode()))


@pytest.mark.parametrize("given", [None, "Bearer wrong", "Basic secret", "secret", "Bearer"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/status"),
        ("POST", "/generate"),
        ("POST", "/pushes"),
        ("PUT", f"/pushes/{PUSH}/0?offset=0&crc32=0"),
        ("POST", f"/pushes/{PUSH}/commit"),
    ],
)
def test_nothing_is_answered_without_the_token(guarded_url, given, method, path):
    headers = {"authorization": given} if given else {}
    assert call(method, guarded_url + path, headers=headers).status_code == 401


def test_the_token_opens_the_server(guarded_url):
    with pytest.raises(RecipeError, match="bearer token"):
        client(guarded_url, token="wrong")
    engine = client(guarded_url, token="secret")
    assert engine.generate(requests(), SAMPLING)
    engine.close()
    for scheme in ("bearer", "BEARER"):
        headers = {"authorization": f"{scheme} secret"}
        assert call("GET", f"{guarded_url}/status", headers=headers).status_code == 200


def test_a_web_page_cannot_call_the_server():
    body = call_bytes(requests(), SAMPLING, POLICY)
    with served(fake(), facts=FACTS) as url:
        for kind in ("text/plain", "application/json", "application/x-www-form-urlencoded"):
            answer = call("POST", f"{url}/generate", body, headers={"content-type": kind})
            assert answer.status_code == 415
        assert call("POST", f"{url}/generate", body).status_code == 200


def test_a_name_that_points_to_this_machine_is_not_enough():
    with served(fake(), facts=FACTS, allowed_hosts=["rollouts.example"]) as url:
        for host in ("attacker.example:8000", "attacker.example", "127.0.0.1.attacker.example", ""):
            answer = call("GET", f"{url}/status", headers={"host": host})
            assert answer.status_code == 400, host
            assert "--allowed-host" in answer.text
        for host in ("localhost:8000", "127.0.0.1", "[::1]:8000", "Rollouts.Example:443"):
            assert call("GET", f"{url}/status", headers={"host": host}).status_code == 200, host


@pytest.mark.parametrize("host", ["10.0.0.7:8000", "[fe80::1]:8000", "localhost", "[::1]"])
def test_an_address_is_a_host_of_this_server(host):
    Access(token=None).check("GET", {"host": host})


@pytest.mark.parametrize("host", ["node7:8000", "[node7]:8000", "10.0.0.7.example", "@[::1]"])
def test_another_name_is_not_a_host_of_this_server(host):
    with pytest.raises(RefusedError, match="is not called"):
        Access(token=None).check("GET", {"host": host})


def test_bodies_above_the_limit_are_refused():
    with served(fake(), facts=FACTS, max_call_bytes=100) as url:
        assert call("POST", f"{url}/generate", b"x" * 101).status_code == 413
        assert call("POST", f"{url}/generate", b"x" * 100).status_code == 400


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[1]",
        b"\x80\x04pickle",
        b"[" * 4000,
        json.dumps({"policy": None, "requests": [], "sampling": {}}).encode(),
    ],
)
@pytest.mark.parametrize("path", ["/generate", "/pushes"])
def test_hostile_calls_are_refused(open_url, path, body):
    assert call("POST", open_url + path, body).status_code == 400
    with pytest.raises(CodecError):
        read_message(GenerateCall, body)


def test_every_key_of_a_call_is_needed_and_none_may_be_added():
    body = json.loads(call_bytes(requests(1), SAMPLING, POLICY))
    read_message(GenerateCall, json.dumps(body).encode())
    for key in body:
        with pytest.raises(CodecError):
            read_message(
                GenerateCall, json.dumps({k: v for k, v in body.items() if k != key}).encode()
            )
    with pytest.raises(CodecError):
        read_message(GenerateCall, json.dumps({**body, "code": "import os"}).encode())
    body["requests"][0]["prompt_ids"] = [1 << 40]
    with pytest.raises(CodecError):
        read_message(GenerateCall, json.dumps(body).encode())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"requests.1.prompt_ids": [5, 32]}, "expected 0 to 31"),
        ({"requests.1.prompt_ids": [-1]}, "expected 0 to 31"),
        ({"requests.1.prompt_ids": []}, "0 prompt tokens"),
        ({"requests.1.prompt_ids": [5] * 4095}, "exceed the context of 4096"),
        ({"requests.1.request_id": 0}, "each once in a call"),
        ({"requests.1.request_id": -1}, "ids from 0"),
        ({"requests": []}, "asks for 0 completions"),
        ({"requests.0.num_generations": 65536}, "expected 1 to 65536"),
        ({"sampling.temperature": -0.5}, "sampling.temperature is -0.5"),
        ({"sampling.temperature": "hot"}, "sampling.temperature"),
        ({"sampling.max_completion_length": 0}, "at least 1"),
        ({"sampling.top_p": 0.0}, "sampling.top_p"),
        ({"sampling.top_k": -1}, "sampling.top_k"),
        ({"sampling.top_k": 1 << 40}, "sampling.top_k"),
        ({"sampling.seed": 1 << 64}, "sampling.seed"),
        ({"sampling.stop_token_ids": [32]}, "ids from 0 to 31"),
        ({"sampling.stop_token_ids": [10**30]}, "ids from 0 to 31"),
    ],
)
def test_r10_a_mistake_of_the_caller_is_refused_at_once_and_not_a_failure(
    open_url, change, message
):
    assert generate(open_url, {}) == (200, "")
    status, text = generate(open_url, change)
    assert status == 400
    assert message in text


def test_a_call_for_other_weights_is_refused_at_once():
    with served(fake(), facts=FACTS) as url:
        body = call_bytes(requests(), SAMPLING, PolicyName(run="test", policy_version=3))
        answer = call("POST", f"{url}/generate", body)
    assert answer.status_code == 409
    assert "the call asks for 3 of test" in answer.text


def test_e2_progress_is_told_while_a_call_runs_and_while_nothing_grows():
    engine, seen, told = HeldEngine(), [], threading.Event()

    # Each of the two completions says three tokens, and then waits.
    both = Progress(doing="sampling", num_tokens=6, num_finished=0)

    def look(progress: Progress) -> None:
        seen.append(progress)
        if seen.count(both) == 3:
            told.set()

    with served(engine, facts=FACTS, progress_s=0.02) as url:
        calls = calls_to(url)
        release = threading.Thread(target=lambda: told.wait(LIMIT_S) and engine.release())
        release.start()
        kept: dict[int, Completion] = {}
        ask = Ask(
            request=requests(1)[0],
            numbers=(0, 1),
            sampling=SAMPLING,
            policy=POLICY,
            description=fake().description,
        )
        calls.complete(ask, keep=kept.__setitem__, on_progress=look)
        release.join()
        calls.close()
    assert sorted(kept) == [0, 1]
    assert seen.count(both) >= 3


def test_a_server_that_loads_says_so(tmp_path):
    server = EngineServer(HeldEngine(), facts=FACTS, push_folder=tmp_path)
    with listening(server.application()) as url:
        answer = call("GET", f"{url}/status")
        assert answer.status_code == 503
        assert "being loaded" in answer.text
        server.ready()
        assert call("GET", f"{url}/status").status_code == 200


def test_a_start_waits_for_a_server_that_loads(tmp_path):
    server = EngineServer(HeldEngine(), facts=FACTS, push_folder=tmp_path)
    application, asked = server.application(), []

    async def ready_when_asked_thrice(scope, receive, send):
        asked.extend([scope["path"]] * (scope["type"] == "http"))
        if len(asked) == 3:
            server.ready()
        await application(scope, receive, send)

    with listening(ready_when_asked_thrice) as url:
        with pytest.raises(CallError, match="being loaded") as failed:
            client(url)
        assert failed.value.fault is Fault.LOADING
        client(url, waits_for_loading=True).close()
    # The one that was refused, one more that was, the one that was not, and what a start asks.
    assert asked == ["/status"] * 4


@pytest.mark.parametrize(
    ("says", "every_s", "lines"), [(True, 3600.0, 1), (True, 0.0, 2), (False, 0.0, 0)]
)
def test_one_rank_says_that_it_waits(says, every_s, lines, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(opening, "_SAY_S", every_s)
    monkeypatch.setattr(opening, "_LOADING_S", 0.0)
    server = EngineServer(HeldEngine(), facts=FACTS, push_folder=tmp_path)
    application, asked = server.application(), []

    async def ready_when_asked_thrice(scope, receive, send):
        asked.extend([scope["path"]] * (scope["type"] == "http"))
        if len(asked) == 3:
            server.ready()
        await application(scope, receive, send)

    with listening(ready_when_asked_thrice) as url:
        client(url, waits_for_loading=True, says_waiting=says).close()
    said = [r.getMessage() for r in caplog.records if r.name == "moe_replay.servers"]
    assert len(said) == lines
    assert all(line.startswith(f"{url} is loading its model, waiting: ") for line in said)


@pytest.mark.parametrize("rank", [0, 1])
def test_no_rank_of_a_dry_run_waits_for_a_server_that_loads(rank, tmp_path):
    server = EngineServer(HeldEngine(), facts=FACTS, push_folder=tmp_path)
    use = EngineUse(model_dir=tmp_path, max_context_length=64, record_routes=True)
    with listening(server.application()) as url:
        section = ServersEngineSection(engine="vllm-server", urls=[url], max_completion_length=8)
        with pytest.raises(CallError, match="being loaded"):
            check_engine(section, use, FACTS, rank=rank, tries_push=True)


def test_a_start_does_not_wait_for_a_server_that_lost_its_engine(tmp_path):
    server = EngineServer(HeldEngine(), facts=FACTS, push_folder=tmp_path)
    with listening(server.application()) as url:
        server.stop("the server has lost its engine")
        with pytest.raises(CallError, match="lost its engine"):
            client(url, waits_for_loading=True)


def test_an_error_of_ours_is_a_failure_with_a_traceback(caplog):
    class Buggy(HeldEngine):
        async def complete(self, request, number, sampling, *, policy_version, progress):
            raise KeyError("layers")

    with served(Buggy(), facts=FACTS) as url:
        assert generate(url, {}) == (500, "KeyError: 'layers'")
    assert [record.exc_info[0] for record in caplog.records] == [KeyError]
