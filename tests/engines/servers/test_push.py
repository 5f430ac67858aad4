"""Pushes by several ranks: none drops a server that took the weights, or asks one that did not."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from moe_replay.checkpoint.facts import checkpoint_tensors, read_facts
from moe_replay.engines.embedded.engine import EmbeddedEngine
from moe_replay.engines.fake import FakeEngine
from moe_replay.engines.servers.push_files import PART_BYTES, WeightsFolder, weight_parts
from moe_replay.errors import EngineError
from moe_replay.testing.tiny_models import write_tiny_checkpoint

from ...support.served import served
from ..server_case import SAMPLING, SHAPES, client, fake, requests, tokens, weights

pytestmark = pytest.mark.vllm


class Rank:
    """A rank of several in threads, which share what each passes to all others."""

    def __init__(self, rank: int, values: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, len(values)
        self._values, self._barrier = values, barrier

    def gather(self, value: Any) -> list[Any]:
        self._values[self.rank] = value
        self._barrier.wait()
        everyone = list(self._values)
        self._barrier.wait()
        return everyone


def two_ranks() -> tuple[Rank, Rank]:
    values, barrier = [None, None], threading.Barrier(2)
    return Rank(0, values, barrier), Rank(1, values, barrier)


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
    loaded, (first_rank, second_rank) = threading.Semaphore(0), two_ranks()

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
        pushing = client(*urls, ranks=first_rank)
        waiting = client(*urls, ranks=second_rank)
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
    first_rank, second_rank = two_ranks()
    with served(fake()) as first, ExitStack() as gone:
        second = gone.enter_context(served(fake()))
        pushing = client(first, second, ranks=first_rank)
        waiting = client(first, second, ranks=second_rank)
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
    first_rank, second_rank = two_ranks()
    with ExitStack() as gone:
        url = gone.enter_context(served(fake()))
        pushing = client(url, ranks=first_rank)
        waiting = client(url, ranks=second_rank)
        gone.close()
        raised = on_ranks(
            lambda: pushing.load_weights(weights(), policy_version=1),
            lambda: waiting.load_weights(weights(), policy_version=1),
        )
        assert "no server took policy version 1" in str(raised[0])
        assert "the rank that pushes policy version 1 failed: no server took" in str(raised[1])
        assert pushing.policy_version == waiting.policy_version == 0
        pushing.close(), waiting.close()


def test_e8_every_rank_is_answered_by_the_checkpoint_of_the_run(tmp_path):
    """The server was started with other weights of the same shape; two ranks."""
    ours, other = (write_tiny_checkpoint(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    facts, (first_rank, second_rank) = read_facts(ours), two_ranks()
    right = tokens(EmbeddedEngine(ours, dtype="float32").generate(requests(2), SAMPLING))
    with served(EmbeddedEngine(other, dtype="float32")) as url:
        pushing = client(url, facts=facts, ranks=first_rank)
        waiting = client(url, facts=facts, ranks=second_rank)
        assert tokens(waiting.generate(requests(2), SAMPLING)) != right
        raised = on_ranks(lambda: pushing.restore(ours), lambda: waiting.restore(ours))
        assert raised == [None, None]
        for engine in (pushing, waiting):
            assert tokens(engine.generate(requests(2), SAMPLING)) == right
            engine.close()


def test_e4_expert_biases_reach_an_engine_bit_for_bit(tmp_path):
    """From a bfloat16 checkpoint with float32 biases, by float32 training, to a bfloat16 engine."""
    model = write_tiny_checkpoint(tmp_path, "deepseek_v3", dtype=torch.bfloat16)
    facts = read_facts(model)
    on_disk = dict(checkpoint_tensors(model))
    biases = {name for name in on_disk if name.endswith("e_score_correction_bias")}
    assert biases and facts.float32_names == biases
    rounded = {name: on_disk[name].bfloat16().float() for name in biases}
    assert not all(torch.equal(rounded[name], on_disk[name]) for name in biases)
    engine = EmbeddedEngine(model, dtype="bfloat16")
    with torch.no_grad():
        for tensor in engine._model.state_dict().values():
            tensor.zero_()
    with served(engine) as url:
        pushing = client(url, facts=facts, dtype="bfloat16")
        trained = [(name, tensor.float()) for name, tensor in on_disk.items()]
        pushing.load_weights(trained, policy_version=1)
        pushing.close()
    held = engine._model.state_dict()
    for name in biases:
        assert held[name].dtype == torch.float32 and torch.equal(held[name], on_disk[name])
    name = "model.embed_tokens.weight"
    assert held[name].dtype == torch.bfloat16 and torch.equal(held[name], on_disk[name])


def test_e4_one_part_of_a_push_is_in_memory():
    """Tensors of the first part are gone while the second one is made."""
    alive: list[weakref.ref[torch.Tensor]] = []

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(4):
            # Two of them fill a part.
            tensor = torch.zeros(PART_BYTES // 8, dtype=torch.float32)
            alive.append(weakref.ref(tensor))
            yield f"w{number}", tensor
            del tensor

    seen = []
    with weight_parts(stream(), folder=WeightsFolder(None), push="push-1") as parts:
        for part in parts:
            seen.append(sum(each() is not None for each in alive))
            del part
    # The one that the stream gave last, which it still holds itself.
    assert seen == [1, 1]
