"""What single payloads of a plain server show of its layers' order adds up, server by server."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from moe_replay.engines.servers.contract import Ask
from moe_replay.engines.servers.faults import CallError, Fault
from moe_replay.engines.servers.plain import PlainCalls
from moe_replay.engines.servers.sglang import SglangCalls
from moe_replay.engines.servers.vllm import VllmCalls
from moe_replay.engines.types import Request, SamplingParams
from moe_replay.routing import RoutedModel, RoutingTrace

from ...support.served import listening
from ...support.sglang_like import SglangLike
from ..server_case import FACTS, LIMIT_S, fake
from .test_vllm_wire import SERVER, VERSION, npy

DENSE_FIRST = replace(
    FACTS, routed=RoutedModel(moe_layers=(1, 2), num_decoder_layers=3, num_experts=8, topk=2)
)
COUNT = 6
# One row each: a prompt of one token, and one sampled token that is never fed.
REQUEST = Request(request_id=7, prompt_ids=np.array([5], np.int32), num_generations=COUNT)
SAMPLING = SamplingParams(max_completion_length=1, seed=3)
Dense = Callable[[int], list[int]]
"""Number of a payload -> what its row holds for the dense layer."""


def zeros(number: int) -> list[int]:
    return [0, 0]


def filler(number: int) -> list[int]:
    return [0, 1]


def routes(number: int) -> list[int]:
    return [number % 8, (number + 1) % 8]


def payloads(dense: Dense) -> Iterator[np.ndarray]:
    for number in itertools.count():
        yield np.array([[dense(number), [3, number % 3], [4, 5 + number % 3]]], np.uint8)


@contextmanager
def vllm(dense: Dense) -> Iterator[VllmCalls]:
    rows = payloads(dense)

    async def generate(request: Any) -> JSONResponse:
        json.loads(await request.body())
        choice = {
            "index": 0,
            "token_ids": [9],
            "logprobs": {"content": [{"token": "token_id:9", "logprob": -0.5}]},
            "finish_reason": "length",
            "routed_experts": npy(next(rows)),
        }
        return JSONResponse({"request_id": "a", "choices": [choice]})

    def answering(told: Any) -> Any:
        async def answer(request: Any) -> JSONResponse:
            return JSONResponse(told)

        return answer

    paths = {"/version": VERSION, "/server_info": SERVER}
    paths |= {"/weight_info": {"weight_version": "default"}, "/metrics": {}}
    application = Starlette(
        routes=[
            *(Route(path, answering(told)) for path, told in paths.items()),
            Route("/inference/v1/generate", generate, methods=["POST"]),
        ]
    )
    with calls_to(VllmCalls, application) as calls:
        yield calls


@contextmanager
def sglang(dense: Dense) -> Iterator[SglangCalls]:
    rows = payloads(dense)

    class Server(SglangLike):
        def _rows(self, trace: RoutingTrace) -> np.ndarray:
            return next(rows).astype(np.int32)

    with calls_to(SglangCalls, Server(fake(), num_decoder_layers=3).application()) as calls:
        yield calls


@contextmanager
def calls_to(kind: type[PlainCalls], application: Any) -> Iterator[Any]:
    with listening(application) as url:
        limits = {"timeout_s": LIMIT_S, "max_answer_bytes": 1 << 20}
        calls = kind(url, token=None, facts=DENSE_FIRST, **limits)
        try:
            yield calls
        finally:
            calls.close()


def asked(calls: PlainCalls, numbers: range = range(COUNT)) -> tuple[int, CallError | None]:
    """Return how many completions were kept, and the first failure."""
    kept: list[int] = []
    status = calls.status()
    ask = Ask(
        request=REQUEST,
        numbers=numbers,
        sampling=SAMPLING,
        policy=status.policy,
        description=status.description,
    )
    try:
        calls.complete(ask, keep=lambda number, completion: kept.append(number))
    except CallError as error:
        return len(kept), error
    return len(kept), None


@pytest.mark.parametrize("server", [vllm, sglang])
def test_payloads_of_one_row_show_together_that_layers_are_out_of_order(server):
    with server(routes) as calls:
        num_kept, failure = asked(calls)
    assert num_kept == 1
    assert failure is not None and failure.fault is Fault.CORRUPT
    assert "decoder layer 0 is dense" in str(failure) and "of 2 rows, which differ" in str(failure)


@pytest.mark.parametrize("server", [vllm, sglang])
def test_what_one_call_showed_counts_in_the_next(server):
    with server(routes) as calls:
        assert asked(calls, range(1)) == (1, None)
        num_kept, failure = asked(calls, range(1, 2))
    assert num_kept == 0 and failure is not None and failure.fault is Fault.CORRUPT


@pytest.mark.parametrize("server", [vllm, sglang])
@pytest.mark.parametrize("dense", [zeros, filler])
def test_layers_in_order_are_taken_payload_after_payload(server, dense):
    with server(dense) as calls:
        assert asked(calls) == (COUNT, None)


@pytest.mark.parametrize("server", [vllm, sglang])
def test_one_server_is_not_judged_by_another(server):
    """Each is asked for one row; the two rows of one server would be refused."""
    with server(routes) as first, server(lambda number: routes(number + 1)) as second:
        assert asked(first, range(1)) == (1, None)
        assert asked(second, range(1)) == (1, None)
