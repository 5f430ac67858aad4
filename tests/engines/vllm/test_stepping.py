"""One thread steps vLLM for all callers: they share steps, and no fault leaves a request behind.

The vLLM here is a stand-in that counts; `test_engine` has the real one.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from moe_replay.engines.types import RolloutProgress
from moe_replay.engines.vllm.stepping import VllmStepper
from moe_replay.errors import EngineError

LENGTH = 20
"""Tokens of each completion."""


@dataclass
class Counting:
    """Adds a token to every request in each step; a prompt is what it shall do wrong."""

    lengths: dict[str, int] = field(default_factory=dict)
    batches: list[int] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    gate: threading.Event | None = None
    is_stepping: threading.Event = field(default_factory=threading.Event)

    def add_request(self, name: str, prompt: str, params: None) -> None:
        if prompt == "half added":
            self.lengths[name] = 0
        if prompt in ("half added", "refused"):
            raise ValueError(f"{prompt}: {name}")
        self.lengths[name] = 0

    def abort_request(self, names: list[str]) -> None:
        for name in names:
            self.lengths.pop(name, None)

    def has_unfinished_requests(self) -> bool:
        return bool(self.lengths)

    def step(self) -> list[Any]:
        self.is_stepping.set()
        if self.gate is not None:
            self.gate.wait()
        self.batches.append(len(self.lengths))
        outputs = []
        for name in list(self.lengths):
            self.lengths[name] += 1
            done = self.lengths[name] == LENGTH
            tokens = [int(name)] * self.lengths[name]
            if done:
                del self.lengths[name]
            outputs.append(
                SimpleNamespace(
                    request_id=name, finished=done, outputs=[SimpleNamespace(token_ids=tokens)]
                )
            )
        return outputs

    def sleep(self, level: int) -> None:
        self.said.append(f"sleep {level}")

    def wake_up(self, tags: list[str]) -> None:
        self.said.append(f"wake {' '.join(tags)}")


@pytest.fixture
def vllm() -> Counting:
    return Counting()


@pytest.fixture
def stepper(vllm):
    stepper = VllmStepper(vllm, sleeps=True, in_step=False)
    yield stepper
    if vllm.gate is not None:
        vllm.gate.set()
    stepper.close()


def ask(stepper: VllmStepper, count: int, prompt: str = "") -> list[Any]:
    return stepper.run([(prompt, None)] * count, at_start=lambda: 0)[1]


def queued(stepper: VllmStepper, count: int) -> None:
    """Wait until so many calls are queued."""
    with stepper._changed:
        stepper._changed.wait_for(lambda: len(stepper._queued) == count)


def test_e14_calls_that_come_together_share_every_step_from_the_next_on(vllm, stepper):
    vllm.gate = threading.Event()
    with ThreadPoolExecutor(32) as threads:
        first = threads.submit(ask, stepper, 4)
        vllm.is_stepping.wait()
        others = [threads.submit(ask, stepper, 4) for _ in range(31)]
        queued(stepper, 31)
        vllm.gate.set()
        answers = [call.result() for call in (first, *others)]
    # The first four run alone for one step, then all 128 share 19, and the last step is of those
    # that came later.
    assert vllm.batches == [4, *[128] * (LENGTH - 1), 124]
    names = [output.request_id for outputs in answers for output in outputs]
    assert sorted(names) == sorted(map(str, range(128)))
    # The control: one after the other takes 32 times as many steps.
    vllm.batches.clear()
    for _ in range(32):
        ask(stepper, 4)
    assert vllm.batches == [4] * LENGTH * 32


@pytest.mark.parametrize("prompt", ["refused", "half added"])
def test_e14_a_request_that_cannot_be_added_takes_its_call_with_it_and_no_other(
    vllm, stepper, prompt
):
    vllm.gate = threading.Event()
    with ThreadPoolExecutor(2) as threads:
        good = threads.submit(ask, stepper, 3)
        vllm.is_stepping.wait()
        bad = threads.submit(
            stepper.run, [("", None), (prompt, None), ("", None)], at_start=lambda: 0
        )
        queued(stepper, 1)
        vllm.gate.set()
        with pytest.raises(EngineError, match=f"3 completions unfinished: ValueError: {prompt}"):
            bad.result()
        assert len(good.result()) == 3
    # Nothing of the bad call ever ran, and nothing is left of it.
    assert set(vllm.batches) == {3}
    assert not vllm.lengths and not stepper._call_of
    with stepper.paused():
        pass
    assert len(ask(stepper, 2)) == 2


def test_e14_a_step_that_fails_ends_every_call_and_the_next_one_works(vllm, stepper, monkeypatch):
    step, steps = vllm.step, []

    def failing() -> list[Any]:
        steps.append(1)
        if len(steps) == 5:
            raise RuntimeError("out of memory")
        return step()

    monkeypatch.setattr(vllm, "step", failing)
    with pytest.raises(EngineError, match="2 completions unfinished: RuntimeError: out of memory"):
        ask(stepper, 2)
    assert not vllm.lengths
    assert stepper.progress == RolloutProgress()
    assert [len(output.outputs[0].token_ids) for output in ask(stepper, 2)] == [LENGTH] * 2


def test_e14_requests_that_cannot_be_withdrawn_end_the_engine_loudly(vllm, stepper, monkeypatch):
    def failing(*_: object) -> None:
        raise RuntimeError("no")

    with monkeypatch.context() as patched:
        patched.setattr(vllm, "step", failing)
        patched.setattr(vllm, "abort_request", failing)
        with pytest.raises(EngineError, match="2 completions unfinished"):
            ask(stepper, 2)
    with pytest.raises(EngineError, match="cannot be withdrawn"):
        ask(stepper, 2)


def test_e14_whoever_waits_hears_of_a_defect_of_our_own(vllm, stepper, monkeypatch):
    monkeypatch.setattr(vllm, "step", lambda: [SimpleNamespace()])
    with pytest.raises(EngineError, match="AttributeError"):
        ask(stepper, 2)


def test_e14_a_push_waits_for_no_call_but_for_those_that_were_left(vllm, stepper):
    """Weights never change under a call, and a caller that left is none."""
    vllm.gate = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(ask, stepper, 2)
        vllm.is_stepping.wait()
        with pytest.raises(EngineError, match="completions are being sampled"), stepper.paused():
            pass
        (running,) = stepper._running
        running.is_left = True
        vllm.gate.set()
        with stepper.paused():
            assert not vllm.lengths
        # Its caller, which has not really left, is let go with nothing.
        assert isinstance(call.exception(), KeyError)
    assert len(vllm.batches) < LENGTH
    assert len(ask(stepper, 2)) == 2


def test_e14_among_ranks_that_step_together_a_call_that_was_left_runs_to_its_end(vllm):
    """Another rank would wait for this one in the middle of its step."""
    stepper = VllmStepper(vllm, sleeps=False, in_step=True)
    vllm.gate = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(ask, stepper, 2)
        vllm.is_stepping.wait()
        stepper._running[0].is_left = True
        vllm.gate.set()
        stepper.close()
        call.result()
    assert vllm.batches == [2] * LENGTH
    assert vllm.said == []


def test_e14_closing_ends_what_runs_and_what_is_queued(vllm, stepper):
    vllm.gate = threading.Event()
    with ThreadPoolExecutor(3) as threads:
        calls = [threads.submit(ask, stepper, 1)]
        vllm.is_stepping.wait()
        calls.append(threads.submit(ask, stepper, 1))
        queued(stepper, 1)
        closing = threads.submit(stepper.close)
        with stepper._changed:
            stepper._changed.wait_for(lambda: stepper._is_closing)
        vllm.gate.set()
        closing.result()
        for call in calls:
            with pytest.raises(EngineError, match="is closed"):
                call.result()
    assert not stepper._thread.is_alive()
    with pytest.raises(EngineError, match="is closed"):
        ask(stepper, 1)


def test_a_call_returns_after_vllm_has_given_its_memory_back(vllm, stepper):
    """The trainer takes that memory next."""
    assert vllm.said == ["sleep 1"]
    ask(stepper, 2)
    assert vllm.said == ["sleep 1", "wake weights kv_cache", "sleep 1"]


def test_a_push_wakes_the_weights_alone_and_the_next_call_the_cache(vllm, stepper):
    """Half awake vLLM takes itself for asleep: a call to sleep would free nothing."""
    for _ in range(2):
        with stepper.paused():
            assert vllm.said == ["sleep 1", "wake weights"]
    with pytest.raises(RuntimeError, match="broke off"), stepper.paused():
        raise RuntimeError("the push broke off")
    ask(stepper, 2)
    assert vllm.said == ["sleep 1", "wake weights", "wake kv_cache", "sleep 1"]


def test_a_vllm_that_never_sleeps_is_never_woken(vllm):
    stepper = VllmStepper(vllm, sleeps=False, in_step=False)
    with stepper.paused():
        pass
    ask(stepper, 1)
    stepper.close()
    assert vllm.said == []


def test_memory_that_is_not_given_back_is_an_error_of_the_call(vllm, stepper, monkeypatch):
    def failing(level: int) -> None:
        raise RuntimeError("cannot sleep")

    monkeypatch.setattr(vllm, "sleep", failing)
    with pytest.raises(EngineError, match="cannot sleep"):
        ask(stepper, 2)


def test_nothing_asked_is_answered_at_once(vllm, stepper):
    assert stepper.run([], at_start=lambda: 7) == (7, [])
    assert vllm.batches == []
