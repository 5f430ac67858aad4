"""Engines that are called from one thread, as the server drives them."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch
from safetensors.torch import save_file

from moe_replay.checkpoint.facts import checkpoint_tensors
from moe_replay.engines.embedded.engine import EmbeddedEngine
from moe_replay.engines.fake import FakeEngine
from moe_replay.engines.serve.engine import (
    PushRefused,
    ServedEngine,
    ThreadedEngine,
    folder_tensors,
    to_its_end,
)
from moe_replay.errors import DivergedError, EngineError
from moe_replay.testing.tiny_models import write_tiny_checkpoint

from ..server_case import LIMIT_S, SAMPLING, SHAPES, fake, requests, weights


def started(make=fake, **options) -> ThreadedEngine:
    engine = ThreadedEngine(make, **options)
    asyncio.run(engine.start())
    return engine


def complete(engine, request, number, **options):
    fields = {"policy_version": 7, "progress": lambda count: None, **options}
    return engine.complete(request, number, SAMPLING, **fields)


def folder_of(path, tensors):
    path.mkdir()
    save_file(dict(tensors), path / "model-00000.safetensors")
    return path


def test_it_is_what_the_server_asks_for():
    assert isinstance(started(), ServedEngine)


def test_completions_are_those_of_the_engine_under_the_name_of_the_run():
    engine, lengths = started(), []

    async def all_of(request):
        return await asyncio.gather(
            *(complete(engine, request, n, progress=lengths.append) for n in (1, 0))
        )

    (wanted,) = requests(1)
    second, first = asyncio.run(all_of(wanted))
    (group,) = fake().generate([wanted], SAMPLING)
    for ours, theirs in zip((first, second), group.completions, strict=True):
        assert ours.token_ids.tolist() == theirs.token_ids.tolist()
        assert ours.policy_version == 7
        assert {span.policy_version for span in ours.trace.origin.spans} == {7}
    assert sorted(lengths) == sorted(len(c.token_ids) for c in (first, second))


def test_e3_what_nobody_waits_for_any_more_is_not_sampled():
    entered, release, sampled = threading.Event(), threading.Event(), []

    class Slow(FakeEngine):
        def generate(self, wanted, sampling):
            sampled.append(wanted[0].request_id)
            entered.set()
            assert release.wait(LIMIT_S)
            return super().generate(wanted, sampling)

    engine = started(Slow)

    async def leave():
        running, waiting, staying = (
            asyncio.create_task(complete(engine, r, 0)) for r in requests(3)
        )
        await asyncio.to_thread(entered.wait, LIMIT_S)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        release.set()
        await asyncio.gather(running, staying)

    asyncio.run(leave())
    assert sampled == [0, 2]


def test_e3_an_engine_that_can_be_cancelled_ends_between_tokens():
    entered, ended = threading.Event(), threading.Event()

    class Cancellable(FakeEngine):
        def generate(self, wanted, sampling, *, cancelled=lambda: False):
            entered.set()
            while wanted[0].request_id == 0 and not cancelled():
                ended.wait(0.01)
            ended.set()
            return super().generate(wanted, sampling)

    engine = started(Cancellable, cancellable=True)

    async def leave():
        first, second = requests(2)
        both = [asyncio.create_task(complete(engine, first, n)) for n in (0, 1)]
        await asyncio.to_thread(entered.wait, LIMIT_S)
        both[0].cancel()
        await asyncio.gather(both[0], return_exceptions=True)
        # The other completion of the request is still wanted.
        assert not ended.is_set()
        both[1].cancel()
        await complete(engine, second, 0)

    asyncio.run(leave())
    assert ended.is_set()


def test_values_of_a_push_are_checked_before_it_touches_the_engine(tmp_path):
    engine = started()
    with pytest.raises(DivergedError):
        asyncio.run(engine.stage(folder_of(tmp_path / "push", weights(float("inf")))))
    asyncio.run(engine.stage(folder_of(tmp_path / "good", weights())))
    assert engine._made.policy_version == 0


def test_a_file_that_is_damaged_is_named(tmp_path):
    (tmp_path / "model-00003.safetensors").write_bytes(b"damaged")
    with pytest.raises(EngineError, match=r"model-00003\.safetensors of a push is not"):
        list(folder_tensors(tmp_path))


def test_a_failed_push_goes_back_to_the_last_good_one(tmp_path):
    loaded = []

    class Failing(FakeEngine):
        def load_weights(self, tensors, *, policy_version):
            value = float(dict(tensors)["lm_head.weight"].mean())
            if value == 2.0:
                raise EngineError("half-way")
            loaded.append(value)
            super().load_weights(weights(), policy_version=policy_version)

    engine = started(lambda: Failing(weight_shapes=SHAPES))
    first, second, third = (
        folder_of(tmp_path / str(value), weights(value)) for value in (1.0, 2.0, 3.0)
    )

    async def push():
        await engine.apply(first)
        with pytest.raises(PushRefused, match="half-way; the weights before this push stay"):
            await engine.apply(second)
        assert loaded == [1.0, 1.0]
        assert first.exists()
        await engine.apply(third)
        assert not first.exists()

    asyncio.run(push())
    assert loaded == [1.0, 1.0, 3.0]


def test_a_failed_first_push_goes_back_to_the_checkpoint(tmp_path):
    loaded = []

    class Failing(FakeEngine):
        def load_weights(self, tensors, *, policy_version):
            loaded.append(float(dict(tensors)["lm_head.weight"].mean()))
            if loaded[-1] >= 2.0:
                raise EngineError(f"no {loaded[-1]}")

    for name, value in (("good", 1.0), ("bad", 3.0)):
        path = write_tiny_checkpoint(tmp_path / name, num_hidden_layers=1)
        save_file(dict(weights(value)), path / "model.safetensors")
    push = folder_of(tmp_path / "push", weights(2.0))
    engine = started(Failing, checkpoint=tmp_path / "good")
    with pytest.raises(PushRefused):
        asyncio.run(engine.apply(push))
    assert loaded == [2.0, 1.0]
    broken = started(Failing, checkpoint=tmp_path / "bad")
    with pytest.raises(EngineError, match=r"no 2\.0.*going back.*no 3\.0"):
        asyncio.run(broken.apply(push))


def test_work_is_done_to_its_end_although_its_task_is_cancelled_twice():
    async def run():
        goes_on, seen = asyncio.Event(), []

        async def work():
            await goes_on.wait()
            seen.append("done")
            raise EngineError("at the end")

        task = asyncio.create_task(to_its_end(work()))
        for _ in range(2):
            await asyncio.sleep(0)
            task.cancel()
        await asyncio.sleep(0)
        assert not task.done()
        goes_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert seen == ["done"]

    asyncio.run(run())


def test_the_embedded_engine_goes_back_to_its_checkpoint_and_takes_the_next_push(tmp_path):
    models = [
        write_tiny_checkpoint(tmp_path / str(seed), seed=seed, num_hidden_layers=2)
        for seed in (0, 1)
    ]
    engine = started(
        lambda: EmbeddedEngine(models[0], dtype="float32"), checkpoint=models[0], cancellable=True
    )
    (wanted,) = requests(1)

    async def sampled():
        return (await complete(engine, wanted, 0)).token_ids.tolist()

    async def push():
        before = await sampled()
        torn = dict(checkpoint_tensors(models[1]))
        # The last one of them, so that most of the others are in the model by then.
        torn[max(torn)] = torch.ones(1)
        with pytest.raises(PushRefused, match="the weights before this push stay"):
            await engine.apply(folder_of(tmp_path / "torn", torn.items()))
        assert await sampled() == before
        whole = dict(checkpoint_tensors(models[1]))
        await engine.apply(folder_of(tmp_path / "whole", whole.items()))
        return await sampled()

    after = asyncio.run(push())
    other = EmbeddedEngine(models[1], dtype="float32")
    assert after == other.generate([wanted], SAMPLING)[0].completions[0].token_ids.tolist()
    other.close()
