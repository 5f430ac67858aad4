"""Sampling and pushing at once: which waits for which, for how long, and who is told."""

from __future__ import annotations

import threading
import zlib

import pytest

from moe_replay.engines.serve.messages import (
    PolicyName,
    Progress,
    PushCommit,
    PushPart,
    call_bytes,
)
from moe_replay.engines.servers.faults import CallError
from moe_replay.errors import EngineError

from ...support.served import served
from ..server_case import (
    FACTS,
    LIMIT_S,
    SAMPLING,
    HeldEngine,
    RawPush,
    call,
    calls_to,
    error_of,
    part,
    policy_of,
    pushed,
    requests,
)

pytestmark = pytest.mark.vllm


class Waiting:
    """A commit in a thread, of a push that waits for running completions."""

    def __init__(self, url: str, policy_version: int = 1) -> None:
        self.push = RawPush(url)
        self.push.begin()
        self.push.put(0, part())
        self.error: Exception | None = None
        self._calls, self._waits = calls_to(url), threading.Event()
        policy = PolicyName(run="test", policy_version=policy_version)
        told = PushPart(
            num_bytes=len(part()), sum=zlib.crc32(zlib.crc32(part()).to_bytes(4, "little"))
        )
        self._body = PushCommit(policy=policy, parts=[told]).model_dump_json().encode()
        self._thread = threading.Thread(target=self._commit)
        self._thread.start()
        assert self._waits.wait(LIMIT_S)

    def _commit(self) -> None:
        def look(progress: Progress) -> None:
            if progress.doing == "waiting":
                self._waits.set()

        try:
            self._calls._result(f"/pushes/{self.push.push_id}/commit", self._body, look)
        except EngineError as error:
            self.error = error

    def join(self) -> Exception | None:
        self._thread.join()
        self._calls.close()
        return self.error


class Generating:
    """A call for completions in a thread."""

    def __init__(self, url: str, *, policy_version: int = 0) -> None:
        self.answer: tuple[int, str] | None = None
        self._policy = PolicyName(run="test", policy_version=policy_version)
        self._thread = threading.Thread(target=self._call, args=(url,))
        self._thread.start()

    def _call(self, url: str) -> None:
        body = call_bytes(requests(1), SAMPLING, self._policy)
        self.answer = error_of(call("POST", f"{url}/generate", body))

    def join(self) -> tuple[int, str] | None:
        self._thread.join()
        return self.answer


def test_a_push_waits_for_running_completions_and_new_calls_wait_for_it():
    engine = HeldEngine()
    with served(engine, facts=FACTS, progress_s=0.02) as url:
        running = Generating(url)
        engine.wait_for(lambda: engine.num_running == 2)
        push = Waiting(url)
        late, stale = Generating(url, policy_version=1), Generating(url, policy_version=0)
        assert engine.applied == []
        assert engine.num_running == 2
        engine.release()
        assert running.join() == (200, "")
        assert push.join() is None
        assert len(engine.applied) == 1
        assert late.join() == (200, "")
        # Asked for by the weights before, it is told so although it was not refused at once.
        assert stale.join()[0] == 409


def test_e5_a_push_that_waits_gives_way_to_the_next():
    engine = HeldEngine()
    with served(engine, facts=FACTS, progress_s=0.02) as url:
        running = Generating(url)
        engine.wait_for(lambda: engine.num_running == 2)
        first = Waiting(url, policy_version=1)
        second = Waiting(url, policy_version=2)
        assert "409" in str(first.join())
        engine.release()
        assert running.join() == (200, "")
        assert second.join() is None
        assert policy_of(url).policy_version == 2
        assert [folder.name for folder in engine.applied] == ["push-2"]


def test_the_wait_of_a_push_has_a_limit_that_is_named():
    engine = HeldEngine()
    with served(engine, facts=FACTS, progress_s=0.02, drain_s=0.1) as url:
        running = Generating(url)
        engine.wait_for(lambda: engine.num_running == 2)
        error = Waiting(url).join()
        assert isinstance(error, CallError)
        assert "1 calls were still sampling" in str(error)
        engine.release()
        assert running.join() == (200, "")
        assert policy_of(url).policy_version == 0
        pushed(url)
