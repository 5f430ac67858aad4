"""Pushes to a rollout server: one transaction each, of any size, all of it or none."""

from __future__ import annotations

import errno
import os
import threading
import zlib
from dataclasses import replace

import pytest
import torch

from moe_replay.engines.fake import FakeEngine
from moe_replay.engines.serve.engine import PushRefused
from moe_replay.engines.serve.messages import (
    MAX_CHUNK_BYTES,
    PolicyName,
    PushCommit,
    PushPart,
    call_bytes,
)
from moe_replay.engines.serve.pushes import largest_push
from moe_replay.errors import EngineError

from ...support.served import served
from ..server_case import (
    FACTS,
    POLICY,
    SAMPLING,
    SHAPES,
    HeldEngine,
    RawPush,
    call,
    client,
    error_of,
    fake,
    part,
    policy_of,
    pushed,
    requests,
    tokens,
    weights,
)

pytestmark = pytest.mark.vllm
NAMES = list(SHAPES)


def test_a_push_in_parts_and_chunks_is_loaded():
    with served(fake(), facts=FACTS) as url:
        push = RawPush(url)
        push.begin()
        for number, name in enumerate(NAMES):
            content = part({name: torch.ones(4, 2)})
            for start in range(0, len(content), 50):
                assert push.put(number, content[start : start + 50]).status_code == 200
        assert push.commit(policy_version=3) == (200, "")
        assert policy_of(url) == PolicyName(run="test", policy_version=3)


def test_e4_one_tensor_longer_than_a_chunk_is_pushed():
    shape = (MAX_CHUNK_BYTES // 4 + 1000,)
    facts = replace(FACTS, weight_shapes={"model.embed_tokens.weight": shape})
    engine = FakeEngine(weight_shapes=facts.weight_shapes)
    with served(engine, facts=facts) as url:
        ours = client(url, facts=facts)
        ours.load_weights([("model.embed_tokens.weight", torch.zeros(shape))], policy_version=1)
        assert policy_of(url).policy_version == 1
        ours.close()


def test_e5_parts_of_another_push_are_refused():
    with served(fake(), facts=FACTS) as url:
        first, second = RawPush(url), RawPush(url)
        first.begin()
        assert first.put(0, part({NAMES[0]: torch.ones(4, 2)})).status_code == 200
        second.begin()
        late = first.put(1, part({NAMES[1]: torch.ones(4, 2)}))
        assert late.status_code == 409
        assert "another one has begun since" in late.text
        status, text = first.commit()
        assert status == 409, text
        assert policy_of(url).policy_version == 0
        # The other one is whole, and not mixed with what the first had sent.
        assert second.put(0, part()).status_code == 200
        assert second.commit(policy_version=2) == (200, "")
        assert policy_of(url).policy_version == 2


def test_e5_two_trainers_that_push_at_once_never_mix():
    """Whoever wins, the parts that were loaded are all of one of them."""
    values = []

    class Reading(FakeEngine):
        def load_weights(self, tensors, *, policy_version):
            held = dict(tensors)
            values.append({float(tensor.mean()) for tensor in held.values()})
            super().load_weights(held.items(), policy_version=policy_version)

    with served(Reading(weight_shapes=SHAPES), facts=FACTS) as url:

        def push(value: float) -> None:
            for version in range(1, 6):
                raw = RawPush(url)
                raw.begin()
                for number, name in enumerate(NAMES):
                    raw.put(number, part({name: torch.full((4, 2), value)}))
                if len(raw.parts) == len(NAMES):
                    status, text = raw.commit(version, run=f"run{value:.0f}")
                    assert status in (200, 409), text

        threads = [threading.Thread(target=push, args=(value,)) for value in (1.0, 2.0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        pushed(url)
    assert {frozenset(seen) for seen in values} <= {frozenset({1.0}), frozenset({2.0})}
    assert values


def test_a_damaged_chunk_is_refused_and_taken_when_it_comes_again():
    with served(fake(), facts=FACTS) as url:
        push = RawPush(url)
        push.begin()
        content = part()
        assert push.put(0, content[:30]).status_code == 200
        flipped = bytes([content[30] ^ 1]) + content[31:]
        assert push.put(0, flipped, crc32=zlib.crc32(content[30:])).status_code == 412
        assert push.put(0, content[30:]).status_code == 200
        assert push.commit() == (200, "")


def test_a_chunk_whose_answer_was_lost_may_come_again():
    with served(fake(), facts=FACTS) as url:
        push = RawPush(url)
        push.begin()
        content = part()
        assert push.put(0, content[:30]).status_code == 200
        assert push.put(0, content[30:50]).status_code == 200
        assert push.put(0, content[30:50], offset=30).status_code == 200
        assert push.put(0, content[50:]).status_code == 200
        assert push.commit() == (200, "")


@pytest.mark.parametrize("offset", [0, 29, 31, 1 << 40])
def test_a_chunk_out_of_order_is_refused(offset):
    with served(fake(), facts=FACTS) as url:
        push = RawPush(url)
        push.begin()
        push.put(0, part()[:20])
        push.put(0, part()[20:30])
        answer = push.put(0, part()[30:], offset=offset)
        assert answer.status_code == 400
        assert f"begins at byte {offset}, expected 30" in answer.text


@pytest.mark.parametrize("what", ["cut", "missing", "damaged"])
def test_a_push_of_which_something_is_missing_is_not_loaded(what):
    with served(fake(), facts=FACTS) as url:
        push = RawPush(url)
        push.begin()
        push.put(0, part({NAMES[0]: torch.ones(4, 2)}))
        push.put(1, part({NAMES[1]: torch.ones(4, 2)}))
        sizes = [len(part({name: torch.ones(4, 2)})) for name in NAMES]
        sums = [
            zlib.crc32(zlib.crc32(b).to_bytes(4, "little"))
            for b in map(b"".join, push.parts.values())
        ]
        told = [PushPart(num_bytes=n, sum=s) for n, s in zip(sizes, sums, strict=True)]
        whole = PushCommit(policy=PolicyName(run="test", policy_version=1), parts=told)
        if what == "cut":
            told[1] = PushPart(num_bytes=sizes[1] + 1, sum=sums[1])
        elif what == "missing":
            told.append(told[0])
        else:
            told[1] = PushPart(num_bytes=sizes[1], sum=sums[1] ^ 1)
        status, text = push.commit_as(whole.model_copy(update={"parts": told}))
        assert status == 400
        assert "missing, cut or damaged: [" in text
        assert policy_of(url).policy_version == 0
        assert push.commit_as(whole) == (200, "")


def test_r10_parts_beyond_the_size_of_the_model_are_refused():
    most = largest_push(FACTS)
    with served(fake(), facts=FACTS) as url:
        push = RawPush(url)
        push.begin()
        half = bytes(most // 2)
        assert push.put(0, half).status_code == 200
        assert push.put(1, half).status_code == 200
        answer = push.put(2, half)
        assert answer.status_code == 400
        assert f"exceeds {most} bytes" in answer.text


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({**dict(weights()), NAMES[0]: torch.ones(4, 2, dtype=torch.int8)}, "pushed as torch.int8"),
        (
            {**dict(weights()), NAMES[0]: torch.ones(4, 2, dtype=torch.float64)},
            "pushed as torch.float64",
        ),
        (
            {**dict(weights()), NAMES[0]: torch.ones(2, 4)},
            "with shape [2, 4], the engine's model has [4, 2]",
        ),
        ({}, "2 of 2 weights were not pushed"),
        ({NAMES[0]: torch.ones(4, 2)}, "1 of 2 weights were not pushed: lm_head.weight"),
        (
            {**dict(weights()), "other": torch.ones(1)},
            "weight other is not in this model's checkpoint",
        ),
    ],
)
def test_r10_weights_of_another_format_name_or_shape_are_refused(tensors, message):
    with served(fake(), facts=FACTS) as url:
        push = RawPush(url)
        push.begin()
        push.put(0, part(tensors))
        status, text = push.commit()
        assert status == 400
        assert message in text
        assert policy_of(url).policy_version == 0
        pushed(url)


def test_r6_one_weight_that_is_not_finite_is_refused():
    tensors = dict(weights())
    tensors[NAMES[1]][3, 1] = float("nan")
    with served(fake(), facts=FACTS) as url:
        push = RawPush(url)
        push.begin()
        push.put(0, part(tensors))
        status, text = push.commit()
        assert status == 422
        assert "lm_head.weight was pushed with 1 of 8 values that are NaN" in text
        pushed(url)


def test_bytes_that_are_no_tensors_are_refused_and_the_next_push_works():
    with served(fake(), facts=FACTS) as url:
        for content in (b"no tensors", b"\xff" * 16, (8).to_bytes(8, "little") + b"[[[[[[[["):
            push = RawPush(url)
            push.begin()
            push.put(0, content)
            status, text = push.commit()
            assert status == 400
            assert "not a safetensors file" in text
        pushed(url)


def test_r10_a_run_with_the_name_of_the_checkpoint_is_refused():
    with served(fake(), facts=FACTS) as url:
        push = RawPush(url)
        push.begin()
        push.put(0, part())
        status, text = push.commit(0, run="checkpoint")
        assert status == 400
        assert "choose another name" in text


@pytest.mark.parametrize("push_id", ["..", "0" * 31, "G" * 32, "a/../b"])
def test_an_id_that_is_none_is_refused(push_id):
    with served(fake(), facts=FACTS) as url:
        body = f'{{"push": "{push_id}"}}'.encode()
        assert call("POST", f"{url}/pushes", body).status_code == 400


def test_a_push_that_fails_leaves_the_old_weights_and_the_old_name():
    class Failing(HeldEngine):
        async def apply(self, folder):
            raise PushRefused("worker 1 of 2 failed; the weights before this push stay")

    engine = Failing()
    engine.release()
    with served(engine, facts=FACTS) as url:
        ours = client(url)
        before = ours.generate(requests(), SAMPLING)
        with pytest.raises(EngineError, match="worker 1 of 2 failed"):
            ours.load_weights(weights(), policy_version=1)
        assert policy_of(url).policy_version == 0
        assert tokens(ours.generate(requests(), SAMPLING)) == tokens(before)
        ours.close()


def test_an_engine_that_cannot_go_back_is_asked_for_nothing_more():
    class Broken(HeldEngine):
        async def apply(self, folder):
            raise EngineError("both failed")

    engine = Broken()
    engine.release()
    with served(engine, facts=FACTS) as url:
        push = RawPush(url)
        push.begin()
        push.put(0, part())
        status, text = push.commit()
        assert (status, "broken: both failed" in text) == (500, True)
        answer = call("POST", f"{url}/generate", call_bytes(requests(1), SAMPLING, POLICY))
        assert error_of(answer)[0] == 409


def test_e10_folders_of_pushes_do_not_pile_up(tmp_path):
    engine = HeldEngine()
    with served(engine, facts=FACTS, push_folder=tmp_path) as url:
        for version in range(1, 4):
            pushed(url, policy_version=version)
        abandoned = RawPush(url)
        abandoned.begin()
        abandoned.put(0, part())
        failed = RawPush(url)
        failed.begin()
        failed.put(0, b"no tensors")
        assert failed.commit()[0] == 400
        # That of the weights that are held, for going back to them.
        assert [path.name for path in tmp_path.iterdir()] == ["push-3"]


def test_a_full_folder_is_named(monkeypatch):
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with served(fake(), facts=FACTS) as url:
        push = RawPush(url)
        push.begin()
        monkeypatch.setattr(os, "pwrite", full)
        answer = push.put(0, part())
        assert answer.status_code == 507
        assert "--weights-dir" in answer.text
        monkeypatch.undo()
        assert push.put(0, part()).status_code == 200
        assert push.commit() == (200, "")
