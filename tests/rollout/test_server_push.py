"""Pushes to several servers by several ranks: no rank drops a server that took the weights, or asks one that did not."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from moe_replay.errors import EngineError
from moe_replay.rollout.fake import FakeEngine
from moe_replay.testing.served import served

from .server_case import SAMPLING, SHAPES, client, fake, requests, weights

pytestmark = pytest.mark.vllm


class Ranks:
    """What each rank passes to all others, the pushing one first."""

    def __init__(self, count: int) -> None:
        self._values: list[Any] = [None] * count
        self._barrier = threading.Barrier(count)

    def share(self, rank: int) -> Callable[[Any], list[Any]]:
        def share(value: Any) -> list[Any]:
            self._values[rank] = value
            self._barrier.wait()
            everyone = list(self._values)
            self._barrier.wait()
            return everyone

        return share


def on_ranks(*calls: Callable[[], Any]) -> list[Any]:
    """Return what each call returned or raised, made at once."""

    def outcome(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except EngineError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as threads:
        return [each.result() for each in [threads.submit(outcome, call) for call in calls]]


def test_e11_no_rank_drops_a_server_that_loads_slowly():
    """One of three servers loads last, after the other two have answered."""
    loaded, ranks = threading.Semaphore(0), Ranks(2)

    class Loading(FakeEngine):
        def __init__(self, *, waits: bool) -> None:
            super().__init__(weight_shapes=SHAPES)
            self._waits = waits

        def load_weights(self, pushed, *, policy_version):
            if self._waits:
                for _ in range(2):
                    loaded.acquire()
            super().load_weights(pushed, policy_version=policy_version)
            loaded.release()

    with ExitStack() as open_servers:
        urls = [open_servers.enter_context(served(Loading(waits=n == 1))) for n in range(3)]
        pushing = client(*urls, share=ranks.share(0))
        waiting = client(*urls, pushes=False, share=ranks.share(1))
        raised = on_ranks(
            lambda: pushing.load_weights(weights(), policy_version=1),
            lambda: waiting.load_weights(weights(), policy_version=1),
        )
        assert raised == [None, None]
        asked = Counter(
            c.server for g in waiting.generate(requests(40), SAMPLING) for c in g.completions
        )
        assert sorted(asked) == sorted(urls) and sum(waiting.faults.values()) == 0
        pushing.close(), waiting.close()


def test_e11_every_rank_leaves_out_the_server_that_did_not_take_a_push():
    ranks = Ranks(2)
    with served(fake()) as first, ExitStack() as gone:
        second = gone.enter_context(served(fake()))
        pushing = client(first, second, share=ranks.share(0))
        waiting = client(first, second, pushes=False, share=ranks.share(1))
        gone.close()
        raised = on_ranks(
            lambda: pushing.load_weights(weights(), policy_version=1),
            lambda: waiting.load_weights(weights(), policy_version=1),
        )
        assert raised == [None, None]
        groups = waiting.generate(requests(), SAMPLING)
        assert {c.server for g in groups for c in g.completions} == {first}
        assert sum(waiting.faults.values()) == 0
        pushing.close(), waiting.close()


def test_e11_a_push_that_failed_stops_every_rank():
    ranks = Ranks(2)
    with ExitStack() as gone:
        url = gone.enter_context(served(fake()))
        pushing = client(url, share=ranks.share(0))
        waiting = client(url, pushes=False, share=ranks.share(1))
        gone.close()
        raised = on_ranks(
            lambda: pushing.load_weights(weights(), policy_version=1),
            lambda: waiting.load_weights(weights(), policy_version=1),
        )
        assert "no server took policy version 1" in str(raised[0])
        assert "the rank that pushes policy version 1 failed: no server took" in str(raised[1])
        assert pushing.policy_version == waiting.policy_version == 0
        pushing.close(), waiting.close()
