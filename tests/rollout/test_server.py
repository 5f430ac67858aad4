"""Rollout servers: whom they answer, and what they refuse."""

from __future__ import annotations

import json
import random

import httpx2
import pytest
from safetensors.torch import save as save_tensors

from moe_replay.errors import CodecError, RecipeError
from moe_replay.rollout.server_messages import (
    PolicyName,
    call_bytes,
    groups_bytes,
    read_call,
    read_groups,
)
from moe_replay.testing.served import served

from .server_case import (
    HEADERS,
    POLICY,
    SAMPLING,
    client,
    fake,
    requests,
    weights,
)

pytestmark = pytest.mark.vllm


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
        response = httpx2.request(method, url + path, headers=headers, timeout=300)
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
                    url + "/generate", content=body, headers={"content-type": kind}, timeout=300
                ).status_code
                == 415
            )
        assert (
            httpx2.post(url + "/generate", content=body, headers=HEADERS, timeout=300).status_code
            == 200
        )


def test_bodies_above_the_limit_are_refused():
    with served(fake(), max_call_bytes=100, max_part_bytes=100) as url:
        assert (
            httpx2.post(
                url + "/generate", content=b"x" * 101, headers=HEADERS, timeout=300
            ).status_code
            == 413
        )
        assert (
            httpx2.put(
                url + "/weights/0", content=b"x" * 101, headers=HEADERS, timeout=300
            ).status_code
            == 413
        )
        assert (
            httpx2.put(
                url + "/weights/0", content=b"x" * 100, headers=HEADERS, timeout=300
            ).status_code
            == 200
        )


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
            httpx2.post(url + "/generate", content=body, headers=HEADERS, timeout=300).status_code
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


def test_every_flipped_bit_of_an_answer_is_refused():
    wanted = requests(2)
    body = groups_bytes(fake().generate(wanted, SAMPLING), POLICY)
    read_groups(body, wanted, max_bytes=1 << 20)
    chance = random.Random(4)
    print("seed 4")
    logprobs = body.index(
        fake().generate(wanted, SAMPLING)[0].completions[0].rollout_logprobs.tobytes()
    )
    # The low bits of a log-probability too: nothing else in the answer would show them.
    places = [*(chance.randrange(len(body)) for _ in range(400)), 0, 3, logprobs, logprobs + 1]
    for place in places:
        damaged = bytearray(body)
        damaged[place] ^= 1 << chance.randrange(8)
        with pytest.raises(CodecError, match="damaged"):
            read_groups(bytes(damaged), wanted, max_bytes=1 << 20)
    for length in (0, 3, 4, len(body) - 1):
        with pytest.raises(CodecError, match="damaged"):
            read_groups(body[:length], wanted, max_bytes=1 << 20)


def test_parts_of_a_push_out_of_order_are_refused():
    part = save_tensors(dict(weights()))
    with served(fake()) as url:
        assert (
            httpx2.put(url + "/weights/1", content=part, headers=HEADERS, timeout=300).status_code
            == 400
        )
        assert (
            httpx2.put(url + "/weights/0", content=part, headers=HEADERS, timeout=300).status_code
            == 200
        )


def test_a_damaged_push_is_refused_and_the_next_one_mends_it():
    with served(fake()) as url:
        httpx2.put(url + "/weights/0", content=b"no tensors", headers=HEADERS, timeout=300)
        commit = PolicyName(run="test", policy_version=1).model_dump_json()
        response = httpx2.post(
            url + "/weights/commit", content=commit, headers=HEADERS, timeout=300
        )
        assert response.status_code == 400
        engine = client(url)
        engine.load_weights(weights(), policy_version=1)
        assert engine.generate(requests(), SAMPLING)
        engine.close()
