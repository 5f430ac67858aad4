"""Rollout servers and their client: what is refused, what is survived, and that nothing is lost or mixed up."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from safetensors.torch import save as save_tensors

from moe_replay.errors import CodecError, EngineError, RecipeError
from moe_replay.rollout.fake import FakeEngine
from moe_replay.rollout.model_facts import ModelFacts
from moe_replay.rollout.server_calls import Fault
from moe_replay.rollout.server_engine import ServerEngine
from moe_replay.rollout.server_messages import (
    CONTENT_TYPE,
    PolicyName,
    call_bytes,
    groups_bytes,
    read_call,
    read_groups,
)
from moe_replay.rollout.types import Request, SamplingParams
from moe_replay.routing import RoutedModel
from moe_replay.testing.served import served

pytestmark = pytest.mark.vllm

SAMPLING = SamplingParams(max_completion_length=6, seed=3)
SHAPES = {"model.embed_tokens.weight": (4, 2), "lm_head.weight": (4, 2)}
FACTS = ModelFacts(
    vocab_size=32,
    max_context_length=4096,
    eos_ids=(1,),
    routed=RoutedModel(moe_layers=(0, 1), num_decoder_layers=2, num_experts=8, topk=2),
    weight_shapes=SHAPES,
    tied_names=frozenset(),
)
POLICY = PolicyName(run="test", policy_version=0)
HEADERS = {"content-type": CONTENT_TYPE}


def fake() -> FakeEngine:
    return FakeEngine(weight_shapes=SHAPES)


def requests(count: int = 6, *, first: int = 0) -> list[Request]:
    rng = np.random.default_rng(first)
    return [
        Request(
            request_id=first + number,
            prompt_ids=rng.integers(4, 32, 5).astype(np.int32),
            num_generations=2,
        )
        for number in range(count)
    ]


def weights(value: float = 1.0) -> list[tuple[str, torch.Tensor]]:
    return [(name, torch.full(shape, value)) for name, shape in SHAPES.items()]


def client(*urls: str, **options: Any) -> ServerEngine:
    fields = {
        "facts": FACTS,
        "run": "test",
        "dtype": "float32",
        "record_routes": True,
        "timeout_s": 60.0,
        **options,
    }
    return ServerEngine(list(urls), **fields)


def tokens(groups: Any) -> list[list[int]]:
    return [c.token_ids.tolist() for group in groups for c in group.completions]


class Faulty:
    """An ASGI application that answers some generate calls wrongly, in turn, by a seeded choice."""

    def __init__(self, application: Any, kinds: list[str], *, share: float, seed: int = 0) -> None:
        self.application, self.kinds, self.share = application, kinds, share
        self.random, self.made = random.Random(seed), Counter()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        is_call = scope["type"] == "http" and scope["path"] == "/generate"
        if not is_call or self.random.random() > self.share:
            return await self.application(scope, receive, send)
        kind = self.random.choice(self.kinds)
        self.made[kind] += 1
        if kind == "die":
            raise RuntimeError("gone")
        if kind == "stall":
            await asyncio.sleep(1.5)
            return None
        if kind == "fail":
            await send({"type": "http.response.start", "status": 500, "headers": []})
            return await send({"type": "http.response.body", "body": b"out of memory"})
        return await self.application(scope, receive, _altered(send, kind, self.random))


def _altered(send: Callable[[Any], Any], kind: str, chance: random.Random) -> Callable[[Any], Any]:
    async def altered(message: Any) -> None:
        body = bytearray(message.get("body", b""))
        if message["type"] == "http.response.start":
            headers = [h for h in message["headers"] if h[0] != b"content-length"]
            message = {**message, "headers": headers}
        elif kind == "flip" and body:
            place = chance.randrange(len(body))
            body[place] ^= 1 << chance.randrange(8)
            message = {**message, "body": bytes(body)}
        elif kind == "cut" and body:
            message = {**message, "body": bytes(body[: chance.randrange(len(body))])}
        await send(message)

    return altered


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
    class Counting(FakeEngine):
        num_requests = 0

        def generate(self, wanted, sampling):
            self.num_requests += len(wanted)
            return super().generate(wanted, sampling)

    engines = [Counting(weight_shapes=SHAPES) for _ in range(2)]
    with served(engines[0]) as first, served(engines[1]) as second:
        engine = client(first, second, calls_per_server=1)
        groups = engine.generate(requests(40), SAMPLING)
        engine.close()
    assert tokens(groups) == tokens(fake().generate(requests(40), SAMPLING))
    assert sum(e.num_requests for e in engines) == 40
    assert min(e.num_requests for e in engines) >= 5


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
        both = client(first, second, calls_per_server=1)
        both._policy = only._policy
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
        with pytest.raises(EngineError, match="holds the weights of policy version 7 of earlier"):
            engine.generate(requests(), SAMPLING)
        engine.load_weights(weights(), policy_version=1)
        assert engine.generate(requests(), SAMPLING)
        earlier.close(), engine.close()


def test_faults_are_survived_without_a_trace_in_the_result():
    kinds = ["die", "stall", "fail", "flip", "cut"]
    faulty: list[Faulty] = []

    def around(seed: int) -> Callable[[Any], Faulty]:
        def wrap(application: Any) -> Faulty:
            faulty.append(Faulty(application, kinds, share=0.3, seed=seed))
            return faulty[-1]

        return wrap

    with served(fake(), around=around(1)) as first, served(fake(), around=around(2)) as second:
        engine = client(first, second, timeout_s=0.7, calls_per_server=3, max_attempts=40)
        for step in range(4):
            wanted = requests(16, first=100 * step)
            assert tokens(engine.generate(wanted, SAMPLING)) == tokens(
                fake().generate(wanted, SAMPLING)
            )
        faults = engine.faults
        engine.close()
    made = faulty[0].made + faulty[1].made
    assert sum(made.values()) >= 20, made
    assert min(made[kind] for kind in kinds) >= 1
    assert faults[Fault.SLOW] >= made["stall"] / 2
    assert faults[Fault.CORRUPT] >= 1 and faults[Fault.FAILED] >= made["fail"]


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


def test_without_any_server_left_the_round_ends_with_their_errors():
    with ExitStack() as gone:
        engine = client(gone.enter_context(served(fake())))
        gone.close()
        with pytest.raises(
            EngineError, match=r"6 of 6 requests are left and no server is.*Connect"
        ):
            engine.generate(requests(), SAMPLING)
        with pytest.raises(EngineError, match="no server took policy version 1"):
            engine.load_weights(weights(), policy_version=1)
        engine.close()


def test_a_request_that_fails_everywhere_stops_the_round():
    with served(fake(), around=lambda app: Faulty(app, ["fail"], share=1.0)) as url:
        engine = client(url, max_attempts=2)
        with pytest.raises(EngineError, match=r"failed 2 times.*out of memory"):
            engine.generate(requests(1), SAMPLING)
        engine.close()


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


def test_d8_a_server_that_records_no_routes_is_refused_before_the_first_step():
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
        pytest.raises(RecipeError, match="no rollout server"),
    ):
        client(url)


async def _hello(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        for _ in range(2):
            await send({"type": (await receive())["type"] + ".complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


@pytest.mark.parametrize("given", [None, "wrong"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/status"),
        ("POST", "/generate"),
        ("PUT", "/weights/0"),
        ("POST", "/weights/commit"),
    ],
)
def test_nothing_is_answered_without_the_token(given, method, path):
    headers = HEADERS | ({"authorization": f"Bearer {given}"} if given else {})
    with served(fake(), token="secret") as url:
        response = httpx2.request(method, url + path, headers=headers, timeout=60)
        with pytest.raises(RecipeError, match="bearer token"):
            client(url, token=given)
    assert response.status_code == 401


def test_the_token_opens_the_server():
    with served(fake(), token="secret") as url:
        engine = client(url, token="secret")
        assert engine.generate(requests(), SAMPLING)
        engine.close()


def test_a_web_page_cannot_call_the_server():
    body = call_bytes(requests(), SAMPLING, POLICY)
    with served(fake()) as url:
        for kind in ("text/plain", "application/json", "application/x-www-form-urlencoded"):
            assert (
                httpx2.post(
                    url + "/generate", content=body, headers={"content-type": kind}, timeout=60
                ).status_code
                == 415
            )
        assert (
            httpx2.post(url + "/generate", content=body, headers=HEADERS, timeout=60).status_code
            == 200
        )


def test_bodies_above_the_limit_are_refused():
    with served(fake(), max_call_bytes=100, max_part_bytes=100) as url:
        assert (
            httpx2.post(
                url + "/generate", content=b"x" * 101, headers=HEADERS, timeout=60
            ).status_code
            == 413
        )
        assert (
            httpx2.put(
                url + "/weights/0", content=b"x" * 101, headers=HEADERS, timeout=60
            ).status_code
            == 413
        )
        assert (
            httpx2.put(
                url + "/weights/0", content=b"x" * 100, headers=HEADERS, timeout=60
            ).status_code
            == 200
        )


def test_an_answer_above_the_limit_is_refused():
    with served(fake()) as url:
        engine = client(url, max_attempts=1)
        engine._servers[0]._max_answer_bytes = 100
        with pytest.raises(EngineError, match="exceeds 100 bytes"):
            engine.generate(requests(1), SAMPLING)
        engine.close()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[1]",
        b"\x80\x04pickle",
        json.dumps({"policy": None, "requests": [], "sampling": {}}).encode(),
    ],
)
def test_hostile_calls_are_refused(body):
    with served(fake()) as url:
        assert (
            httpx2.post(url + "/generate", content=body, headers=HEADERS, timeout=60).status_code
            == 400
        )
    with pytest.raises(CodecError):
        read_call(body)


def test_every_key_of_a_call_is_needed_and_none_may_be_added():
    call = json.loads(call_bytes(requests(1), SAMPLING, POLICY))
    read_call(json.dumps(call).encode())
    for key in call:
        with pytest.raises(CodecError):
            read_call(json.dumps({k: v for k, v in call.items() if k != key}).encode())
    with pytest.raises(CodecError):
        read_call(json.dumps({**call, "code": "import os"}).encode())
    call["requests"][0]["prompt_ids"] = [1 << 40]
    with pytest.raises(CodecError):
        read_call(json.dumps(call).encode())


def test_every_flipped_bit_of_an_answer_is_refused_or_changes_nothing_replayed():
    wanted = requests(2)
    groups = fake().generate(wanted, SAMPLING)
    body = groups_bytes(groups, POLICY)
    chance = random.Random(4)
    intact, _ = read_groups(body, wanted, max_bytes=1 << 20)
    for _ in range(400):
        damaged = bytearray(body)
        damaged[chance.randrange(len(body))] ^= 1 << chance.randrange(8)
        try:
            read, _ = read_groups(bytes(damaged), wanted, max_bytes=1 << 20)
        except CodecError:
            continue
        ours, theirs = (
            [c.trace.expert_ids.tolist() for g in every for c in g.completions]
            for every in (read, intact)
        )
        assert ours == theirs


def test_parts_of_a_push_out_of_order_are_refused():
    part = save_tensors(dict(weights()))
    with served(fake()) as url:
        assert (
            httpx2.put(url + "/weights/1", content=part, headers=HEADERS, timeout=60).status_code
            == 400
        )
        assert (
            httpx2.put(url + "/weights/0", content=part, headers=HEADERS, timeout=60).status_code
            == 200
        )


def test_a_damaged_push_is_refused_and_the_next_one_mends_it():
    with served(fake()) as url:
        httpx2.put(url + "/weights/0", content=b"no tensors", headers=HEADERS, timeout=60)
        commit = PolicyName(run="test", policy_version=1).model_dump_json()
        response = httpx2.post(url + "/weights/commit", content=commit, headers=HEADERS, timeout=60)
        assert response.status_code == 400
        engine = client(url)
        engine.load_weights(weights(), policy_version=1)
        assert engine.generate(requests(), SAMPLING)
        engine.close()


def test_an_engine_that_does_not_push_waits_for_the_one_that_does():
    with served(fake()) as url:
        pushing, waiting = client(url), client(url, pushes=False, timeout_s=1.0)
        with pytest.raises(EngineError, match="rank that pushes has failed"):
            waiting.load_weights(weights(), policy_version=1)
        pushing.load_weights(weights(), policy_version=1)
        waiting.load_weights(weights(), policy_version=1)
        assert tokens(waiting.generate(requests(), SAMPLING)) == tokens(
            pushing.generate(requests(), SAMPLING)
        )
        pushing.close(), waiting.close()


def test_urls_must_be_different():
    with pytest.raises(RecipeError, match="each once"):
        client("http://127.0.0.1:1", "http://127.0.0.1:1")
