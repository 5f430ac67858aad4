"""The client of rollout servers: what it survives, and that nothing is lost or mixed up."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moe_replay.engines.fake import FakeEngine
from moe_replay.engines.serve.messages import (
    PolicyName,
)
from moe_replay.engines.servers.faults import CallError, Fault
from moe_replay.engines.types import RolloutProgress
from moe_replay.errors import EngineError, RecipeError
from moe_replay.grpo.stopping import StopRequest, StopRequested

from ...support.faults import FAULTS, Faulty
from ...support.rounds import asking_all
from ...support.served import served
from ..server_case import (
    LIMIT_S,
    SAMPLING,
    SHAPES,
    client,
    fake,
    requests,
    tokens,
    weights,
)

pytestmark = pytest.mark.vllm


def test_completions_are_those_of_the_engine_behind_the_server():
    with served(fake()) as url:
        engine = client(url)
        ours = engine.generate(requests(), SAMPLING)
        engine.close()
    theirs = fake().generate(requests(), SAMPLING)
    for a, b in zip(ours, theirs, strict=True):
        for mine, other in zip(a.completions, b.completions, strict=True):
            assert mine.token_ids.tolist() == other.token_ids.tolist()
            assert mine.rollout_logprobs.tolist() == other.rollout_logprobs.tolist()
            assert (np.sort(mine.trace.expert_ids) == np.sort(other.trace.expert_ids))[:-1].all()
            assert mine.finish_reason == other.finish_reason


def test_work_is_spread_over_all_servers():
    both = threading.Barrier(2)

    class Counting(FakeEngine):
        num_requests = 0

        def generate(self, wanted, sampling):
            self.num_requests += len(wanted)
            if self.num_requests <= 5:
                # Comes back when the other server has been asked as often.
                both.wait(timeout=LIMIT_S)
            return super().generate(wanted, sampling)

    engines = [Counting(weight_shapes=SHAPES) for _ in range(2)]
    with served(engines[0]) as first, served(engines[1]) as second:
        engine = client(first, second, calls_per_server=1)
        groups = engine.generate(requests(40), SAMPLING)
        engine.close()
    assert tokens(groups) == tokens(fake().generate(requests(40), SAMPLING))
    assert sum(e.num_requests for e in engines) == 40
    assert min(e.num_requests for e in engines) >= 5


def test_few_requests_are_spread_over_servers_with_room_for_all_of_them():
    both = threading.Barrier(2)

    class Counting(FakeEngine):
        num_requests = 0

        def generate(self, wanted, sampling):
            self.num_requests += len(wanted)
            if self.num_requests == 1:
                both.wait(timeout=LIMIT_S)
            return super().generate(wanted, sampling)

    engines = [Counting(weight_shapes=SHAPES) for _ in range(2)]
    with served(engines[0]) as first, served(engines[1]) as second:
        engine = client(first, second, calls_per_server=16)
        engine.generate(requests(16), SAMPLING)
        engine.close()
    assert min(e.num_requests for e in engines) >= 2


def test_ranks_begin_with_different_servers():
    with ExitStack() as stack:
        urls = [stack.enter_context(served(fake())) for _ in range(3)]
        engine = client(*urls)
        order = [[s.url for s in engine._in_turn(requests(2, first=rank))] for rank in range(4)]
        engine.close()
    assert [each[0] for each in order] == [*urls, urls[0]]
    assert all(sorted(each) == sorted(urls) for each in order)


def test_e3_the_error_of_one_call_gives_up_the_others():
    """One of two servers refuses a request for good; nobody waits for what the other one holds."""
    held, release = threading.Event(), threading.Event()

    class Holding(FakeEngine):
        def generate(self, wanted, sampling):
            held.set()
            release.wait()
            return super().generate(wanted, sampling)

    class Refusing(FakeEngine):
        def generate(self, wanted, sampling):
            held.wait()
            raise RecipeError("no such thing")

    try:
        with (
            served(Holding(weight_shapes=SHAPES)) as first,
            served(Refusing(weight_shapes=SHAPES)) as second,
        ):
            engine = client(first, second, calls_per_server=1)
            with pytest.raises(EngineError, match="no such thing"):
                engine.generate(requests(), SAMPLING)
            release.set()
            engine.close()
    finally:
        release.set()


def test_a_push_reaches_all_servers_and_names_its_version():
    with served(fake()) as first, served(fake()) as second:
        engine = client(first, second)
        before = engine.generate(requests(), SAMPLING)
        engine.load_weights(weights(), policy_version=1)
        after = engine.generate(requests(), SAMPLING)
        statuses = [server.status().policy for server in engine._servers]
        engine.close()
    assert tokens(before) != tokens(after)
    assert statuses == [PolicyName(run="test", policy_version=1)] * 2
    assert {c.policy_version for g in after for c in g.completions} == {1}
    spans = {s.policy_version for g in after for c in g.completions for s in c.trace.origin.spans}
    assert spans == {1}


def test_a_server_with_other_weights_is_stale_and_the_other_does_its_work():
    with served(fake()) as first, served(fake()) as second:
        only = client(first)
        only.load_weights(weights(), policy_version=1)
        both = asking_all(client(first, second, calls_per_server=1))
        both._run, both._policy_version = only._run, only.policy_version
        groups = both.generate(requests(40), SAMPLING)
        assert both.faults[Fault.STALE] >= 1
        assert {c.policy_version for g in groups for c in g.completions} == {1}
        both.load_weights(weights(), policy_version=2)
        assert len({server.status().policy for server in both._servers}) == 1
        only.close(), both.close()


def test_weights_of_an_earlier_run_are_stale():
    with served(fake()) as url:
        earlier = client(url, run="earlier")
        earlier.load_weights(weights(), policy_version=7)
        engine = client(url)
        with pytest.raises(
            EngineError,
            match=r"no server is.*holds the weights of policy version 7 of earlier.*start the servers",
        ):
            engine.generate(requests(), SAMPLING)
        engine.load_weights(weights(), policy_version=1)
        assert engine.generate(requests(), SAMPLING)
        earlier.close(), engine.close()


def test_faults_are_survived_without_a_trace_in_the_result():
    faulty: list[Faulty] = []
    kinds = [kind for kind in FAULTS if kind != "stall"]

    def around(seed: int) -> Callable[[Any], Faulty]:
        def wrap(application: Any) -> Faulty:
            faulty.append(Faulty(application, kinds, share=0.3, seed=seed))
            return faulty[-1]

        return wrap

    with served(fake(), around=around(1)) as first, served(fake(), around=around(2)) as second:
        engine = client(first, second, calls_per_server=3, max_attempts=40)
        for step in range(4):
            wanted = requests(16, first=100 * step)
            assert tokens(engine.generate(wanted, SAMPLING)) == tokens(
                fake().generate(wanted, SAMPLING)
            )
        faults = engine.faults
        engine.close()
    made = faulty[0].made + faulty[1].made
    assert sum(made.values()) >= 12, made
    assert min(made[kind] for kind in kinds) >= 1
    # A call that dies is answered with 500, or its connection breaks, by the server's timing.
    assert min(faults[kind] for kind in (Fault.CORRUPT, Fault.FAILED)) >= 1
    assert sum(faults.values()) >= made["die"] + made["fail"]


def test_an_answer_that_does_not_come_is_asked_for_again():
    """Whatever else is slow on this machine is only asked for more often."""
    stalled = Faulty(None, ("stall",), share=1.0, stall_s=3600.0)

    def stall_once(application: Any) -> Callable[..., Any]:
        async def answer(scope: Any, receive: Any, send: Any) -> None:
            first = scope["type"] == "http" and scope["path"] == "/generate" and not stalled.made
            await (stalled if first else application)(scope, receive, send)

        return answer

    with served(fake(), around=stall_once) as url:
        engine = client(url, timeout_s=3.0, max_attempts=100)
        groups = engine.generate(requests(), SAMPLING)
        faults = engine.faults
        engine.close()
    assert tokens(groups) == tokens(fake().generate(requests(), SAMPLING))
    assert stalled.made["stall"] == 1
    assert faults[Fault.SLOW] >= 1


def test_a_server_that_died_leaves_its_work_to_the_other():
    with served(fake()) as first, ExitStack() as gone:
        second = gone.enter_context(served(fake()))
        engine = client(first, second)
        gone.close()
        groups = engine.generate(requests(), SAMPLING)
        assert tokens(groups) == tokens(fake().generate(requests(), SAMPLING))
        engine.load_weights(weights(), policy_version=1)
        assert engine.faults[Fault.UNREACHABLE] >= 1
        engine.close()


def test_the_last_server_is_tried_until_a_request_has_failed_too_often():
    with ExitStack() as gone:
        engine = client(*(gone.enter_context(served(fake())) for _ in range(2)), max_attempts=5)
        gone.close()
        with pytest.raises(
            EngineError, match=r"failed 5 times, last.*no connection.*can be resumed"
        ):
            engine.generate(requests(), SAMPLING)
        with pytest.raises(EngineError, match="no server took policy version 1"):
            engine.load_weights(weights(), policy_version=1)
        engine.close()


def test_a_request_that_fails_everywhere_stops_the_round():
    with served(fake(), around=lambda app: Faulty(app, ("fail",), share=1.0)) as url:
        engine = client(url, max_attempts=2)
        with pytest.raises(EngineError, match=r"failed 2 times.*out of memory"):
            engine.generate(requests(1), SAMPLING)
        engine.close()


def test_a_call_error_passes_between_processes():
    error = pickle.loads(pickle.dumps(CallError(Fault.SLOW, "no answer")))
    assert (type(error), error.fault, str(error)) == (CallError, Fault.SLOW, "no answer")


def test_swapped_routes_are_a_fault_and_not_a_sample():
    class Swapping(FakeEngine):
        num_calls = 0

        def generate(self, wanted, sampling):
            groups = super().generate(wanted, sampling)
            self.num_calls += 1
            if self.num_calls % 2:
                return groups
            (group,) = groups
            first, second = group.completions
            swapped = replace(first, trace=second.trace), replace(second, trace=first.trace)
            return [replace(group, completions=swapped)]

    with served(Swapping(weight_shapes=SHAPES)) as url:
        engine = client(url)
        groups = engine.generate(requests(), SAMPLING)
        assert tokens(groups) == tokens(fake().generate(requests(), SAMPLING))
        assert engine.faults[Fault.CORRUPT] >= 1
        engine.close()


def test_a_server_that_records_no_routes_is_refused_before_the_first_step():
    class Blind(FakeEngine):
        @property
        def description(self):
            return replace(super().description, records_routes=False)

    with served(Blind()) as url:
        with pytest.raises(RecipeError, match="--no-record-routes"):
            client(url)
        client(url, record_routes=False).close()


def test_a_server_of_another_model_is_refused():
    with served(FakeEngine(num_experts=16)) as url, pytest.raises(RecipeError, match="serve model"):
        client(url)


def test_a_server_of_another_number_format_is_refused():
    with served(fake()) as url, pytest.raises(RecipeError, match="--dtype bfloat16"):
        client(url, dtype="bfloat16")


def test_something_that_is_no_rollout_server_is_refused():
    with (
        served(fake(), around=lambda _: _hello) as url,
        pytest.raises(RecipeError, match="not a rollout server"),
    ):
        client(url)


async def _hello(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        for _ in range(2):
            await send({"type": (await receive())["type"] + ".complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


def test_an_answer_above_the_limit_is_refused():
    with served(fake()) as url:
        engine = client(url, max_attempts=1)
        engine._servers[0]._max_answer_bytes = 100
        with pytest.raises(EngineError, match="exceeds 100 bytes"):
            engine.generate(requests(1), SAMPLING)
        engine.close()


def test_urls_must_be_different():
    with pytest.raises(RecipeError, match="each once"):
        client("http://127.0.0.1:1", "http://127.0.0.1:1")


def test_d9_the_requests_that_were_answered_are_counted():
    seen = []

    class Asked(FakeEngine):
        def generate(self, wanted, sampling):
            seen.append(engine.progress)
            return super().generate(wanted, sampling)

    with served(Asked(weight_shapes=SHAPES)) as url:
        engine = client(url, calls_per_server=1)
        groups = engine.generate(requests(3), SAMPLING)
        after = engine.progress
        engine.close()
    lengths = [sum(len(c.token_ids) for c in group.completions) for group in groups]
    assert seen == [
        RolloutProgress(num_finished=2 * n, num_total=6, num_tokens=sum(lengths[:n]))
        for n in range(3)
    ]
    assert after == RolloutProgress()


def test_r8_a_request_to_stop_does_not_wait_for_a_server_that_is_silent():
    stop, release = StopRequest(), threading.Event()

    class Silent(FakeEngine):
        def generate(self, wanted, sampling):
            stop.ask("SIGTERM")
            release.wait()
            return super().generate(wanted, sampling)

    with served(Silent(weight_shapes=SHAPES)) as url:
        engine = client(url)
        try:
            # Would wait for `release`, which is set only after it, for ever.
            with (
                stop.listening(forwards=False, say=print),
                pytest.raises(StopRequested),
                stop.breaking_off(),
            ):
                engine.generate(requests(), SAMPLING)
        finally:
            release.set()
            engine.close()
