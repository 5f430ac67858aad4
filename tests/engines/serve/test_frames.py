"""Frames of an answer: whole, or refused, whatever happened to a bit or a byte of them."""

from __future__ import annotations

import random

import pytest

from moe_replay.engines.serve.frames import (
    ERROR,
    PROGRESS,
    RESULT,
    ProgressWatch,
    error_frame,
    frame,
    last_frame,
    read_error,
)
from moe_replay.engines.serve.messages import groups_bytes, read_groups
from moe_replay.errors import CodecError

from ..server_case import POLICY, SAMPLING, fake, requests


def test_a_frame_has_the_bytes_of_its_definition():
    assert frame(PROGRESS, b"{}").hex(" ") == "50 02 00 00 00 7b 7d 7e 3a 0e 11"


def test_the_last_frame_is_the_answer():
    body = frame(PROGRESS, b"{}") * 3 + frame(RESULT, b"all of it")
    assert last_frame(body) == (RESULT, b"all of it")


def test_an_error_inside_of_an_answer_keeps_its_status():
    kind, payload = last_frame(frame(PROGRESS, b"{}") + error_frame(409, "other weights"))
    assert kind == ERROR
    assert read_error(payload) == (409, "other weights")


@pytest.mark.parametrize("payload", [b"", b"[]", b'{"status": null, "text": "x"}', b"\xff"])
def test_an_error_that_is_none_is_refused(payload):
    with pytest.raises(CodecError, match="damaged"):
        read_error(payload)


def test_every_flipped_bit_of_an_answer_is_refused():
    wanted = requests(2)
    result = groups_bytes(fake().generate(wanted, SAMPLING), POLICY)
    body = frame(PROGRESS, b'{"num_tokens": 17}') + frame(RESULT, result)
    assert last_frame(body) == (RESULT, result)
    read_groups(result, wanted, max_bytes=1 << 20)
    chance = random.Random(4)
    print("seed 4")
    logprobs = body.index(
        fake().generate(wanted, SAMPLING)[0].completions[0].rollout_logprobs.tobytes()
    )
    # The low bits of a log-probability too: nothing else in the answer would show them.
    places = [
        *(chance.randrange(len(body)) for _ in range(400)),
        *range(60),
        logprobs,
        logprobs + 1,
    ]
    for place in places:
        damaged = bytearray(body)
        damaged[place] ^= 1 << chance.randrange(8)
        with pytest.raises(CodecError, match="damaged"):
            last_frame(bytes(damaged))


def test_an_answer_that_is_cut_is_refused():
    body = frame(PROGRESS, b"{}") + frame(RESULT, b"result")
    for length in range(len(body)):
        with pytest.raises(CodecError, match="damaged"):
            last_frame(body[:length])
    with pytest.raises(CodecError, match="expected a result or an error as the last one"):
        last_frame(body + frame(PROGRESS, b"{}"))


@pytest.mark.parametrize("step", [1, 2, 7, 1000])
def test_e2_progress_is_seen_however_the_answer_is_cut(step):
    seen: list[bytes] = []
    watch = ProgressWatch(seen.append)
    body = frame(PROGRESS, b"one") + frame(PROGRESS, b"") + frame(PROGRESS, b"three")
    body += frame(RESULT, frame(PROGRESS, b"no progress, a part of the result"))
    for start in range(0, len(body), step):
        watch.feed(body[start : start + step])
    assert seen == [b"one", b"", b"three"]
