"""Servers that fail on purpose fail as they say, also when their answers come in pieces."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest

from moe_replay.engines.fake import FakeEngine
from moe_replay.engines.serve.messages import PolicyName, Progress
from moe_replay.engines.servers.contract import Ask
from moe_replay.engines.servers.faults import CallError, Fault
from moe_replay.engines.servers.own import ServerCalls
from moe_replay.engines.types import Completion, Request, SamplingParams

from .faults import Faulty, Relay
from .served import listening, served

pytestmark = pytest.mark.vllm
LIMIT_S = 300.0
POLICY = PolicyName(run="test", policy_version=0)
SAMPLING = SamplingParams(max_completion_length=6, seed=3)


class SlowEngine(FakeEngine):
    """A fake engine that samples once ``may_sample`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.may_sample = threading.Event()

    def generate(self, requests, sampling):
        assert self.may_sample.wait(LIMIT_S)
        return super().generate(requests, sampling)


def generate(url, on_progress=lambda progress: None):
    calls = ServerCalls(url, token=None, timeout_s=LIMIT_S, max_answer_bytes=1 << 20)
    request = Request(request_id=0, prompt_ids=np.array([5, 6], dtype=np.int32), num_generations=1)
    try:
        kept: dict[int, Completion] = {}
        ask = Ask(
            request=request,
            numbers=(0,),
            sampling=SAMPLING,
            policy=POLICY,
            description=calls.status().description,
        )
        calls.complete(ask, keep=kept.__setitem__, on_progress=on_progress)
    finally:
        calls.close()
    return kept[0].token_ids.tolist()


def test_a_relay_passes_pieces_on_as_they_come():
    engine, seen = SlowEngine(), []

    def look(progress: Progress) -> None:
        # The answer ends only after its progress has come through.
        seen.append(progress.doing)
        engine.may_sample.set()

    with served(engine, progress_s=0.02) as behind, listening(Relay(behind)) as url:
        passed_on = generate(url, look)
        assert passed_on == generate(behind)
    assert seen[0] == "sampling"


@pytest.mark.parametrize("kind", ["flip", "cut"])
def test_damage_in_any_piece_of_an_answer_is_seen(kind):
    """The first piece that is damaged is progress here; in a short answer it is the result."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    engine = SlowEngine()
    timer = threading.Timer(0.2, engine.may_sample.set)
    with served(engine, progress_s=0.02) as behind:
        application = Faulty(Relay(behind), [kind], share=1.0, seed=seed)
        with listening(application) as url:
            timer.start()
            for _ in range(5):
                with pytest.raises(CallError) as refused:
                    generate(url)
                assert refused.value.fault is Fault.CORRUPT
        assert application.made == {kind: 5}
        assert generate(behind)
