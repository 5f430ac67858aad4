"""Pushes by several ranks: none drops a server that took the weights, or asks one that did not."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load

from moe_replay.checkpoint.facts import checkpoint_tensors, read_facts
from moe_replay.engines.embedded.engine import EmbeddedEngine
from moe_replay.engines.fake import FakeEngine
from moe_replay.engines.serve.messages import PolicyName
from moe_replay.engines.servers.faults import CallError, Fault
from moe_replay.engines.servers.push import push
from moe_replay.engines.servers.push_files import WeightPart, WeightsFolder, weight_parts
from moe_replay.errors import DivergedError, EngineError
from moe_replay.testing.tiny_models import write_tiny_checkpoint

from ...support.rounds import asking_all
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
        groups = asking_all(waiting).generate(requests(40), SAMPLING)
        asked = {c.server for g in groups for c in g.completions}
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


def test_e4_one_part_of_a_push_is_in_memory_while_the_next_is_made():
    """Tensors of the first part are gone while the second one is made."""
    alive: list[weakref.ref[np.ndarray]] = []

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(4):
            array = np.full(256, number, dtype=np.float32)
            alive.append(weakref.ref(array))
            tensor = torch.from_numpy(array)
            del array
            yield f"w{number}", tensor
            del tensor

    seen = []
    folder = WeightsFolder(None)
    # Two of them fill a part.
    with weight_parts(stream(), folder=folder, push="push-1", bucket_bytes=2048) as parts:
        for part in parts:
            seen.append(sum(each() is not None for each in alive))
            del part
    # Two are those of the part; the third belongs to the next one, and tells that this one is full.
    assert seen == [3, 2]


class Slow:
    """A server that takes parts when it is let, and remembers them."""

    how_to_record, reads_files, returns_candidates = "", False, False

    def __init__(self, url: str, *, fails_at: int = -1, error: EngineError | None = None) -> None:
        self.url, self.taken, self.committed = url, [], []
        self._may, self.took = threading.Semaphore(0), threading.Semaphore(0)
        self._fails_at = fails_at
        self._error = error or CallError(Fault.UNREACHABLE, f"{url} is gone")

    def let(self, count: int = 1) -> None:
        for _ in range(count):
            self._may.release()

    def put_weights(self, part: WeightPart) -> None:
        self._may.acquire()
        if part.number == self._fails_at:
            raise self._error
        content = b"".join(bytes(p) for chunk in part.chunks(64) for p in chunk.pieces)
        assert len(content) == part.num_bytes
        self.taken.append(content)
        self.took.release()

    def commit_weights(self, policy: PolicyName) -> None:
        self.committed.append(policy.policy_version)

    def give_up(self) -> None:
        self.let(100)

    def status(self) -> Any: ...

    def check(self) -> None: ...

    def complete(self, ask: Any, **how: Any) -> None: ...

    def biases(self, error: CallError) -> bool: ...

    def close(self) -> None: ...


NUM_TENSORS = 12
TENSORS = {f"w{n:02}": torch.arange(16, dtype=torch.float32) + n for n in range(NUM_TENSORS)}


def pushed(*servers: Any, made: Callable[[int], None] = lambda n: None) -> Any:
    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for number, (name, tensor) in enumerate(TENSORS.items()):
            made(number)
            yield name, tensor

    return push(
        stream(),
        PolicyName(run="r", policy_version=3),
        servers,
        folder=WeightsFolder(None),
        num_bytes=0,
        bucket_bytes=2 * 64,
        must_reach_all=False,
        faults=Counter(),
    )


def test_servers_take_parts_at_their_own_speed_and_two_parts_exist_at_a_time():
    fast, slow = Slow("fast"), Slow("slow")
    fast.let(100)
    slow.let(100)
    ahead = []

    def made(number: int) -> None:
        # Tensor 2k + 2 shows that part k is full, and may be given out.
        ahead.append(number // 2 - min(len(fast.taken), len(slow.taken)))

    result = pushed(fast, slow, made=made)
    assert fast.taken == slow.taken and len(fast.taken) == NUM_TENSORS // 2
    loaded = {name: t for part in fast.taken for name, t in load(part).items()}
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    assert set(result.urls) == {"fast", "slow"}
    assert result.num_bytes == sum(map(len, fast.taken))
    assert fast.committed == slow.committed == [3]
    # One is with the servers, one full, and the tensor that did not fit is made.
    assert max(ahead) <= 2


def test_a_slow_server_holds_up_the_making_and_no_fast_one_by_more_than_a_part():
    fast, slow = Slow("fast"), Slow("slow")
    fast.let(100)
    made: list[int] = []
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(pushed, fast, slow, made=made.append)
        for _ in range(2):
            assert fast.took.acquire(timeout=600)
        # Part 0 is with the slow server, so part 2 is not begun: tensor 4 is where part 1 was full.
        assert (len(fast.taken), slow.taken, max(made)) == (2, [], 4)
        assert not fast.took.acquire(timeout=0.2)
        slow.let(100)
        call.result()
    assert slow.taken == fast.taken


@pytest.mark.parametrize("fails_at", [0, 3, 5])
def test_a_server_that_dies_in_the_middle_holds_nobody_up_and_is_not_committed(fails_at):
    living, dying = Slow("living"), Slow("dying", fails_at=fails_at)
    living.let(100)
    dying.let(100)
    result = pushed(living, dying)
    assert (result.urls, living.committed, dying.committed) == (("living",), [3], [])
    assert len(living.taken) == 6 and len(dying.taken) == fails_at


def test_when_all_die_the_stream_is_read_to_its_end_for_the_other_ranks():
    made: list[int] = []
    dying = [Slow(f"d{n}", fails_at=n) for n in range(2)]
    for server in dying:
        server.let(100)
    with pytest.raises(EngineError, match=r"no server took policy version 3: .*d0 is gone"):
        pushed(*dying, made=made.append)
    assert made == list(range(NUM_TENSORS))


def test_what_one_server_refuses_no_server_loads():
    refusing = Slow("r", fails_at=2, error=EngineError("not this model"))
    taking = Slow("t")
    refusing.let(100)
    taking.let(100)
    with pytest.raises(EngineError, match="not this model"):
        pushed(taking, refusing)
    assert taking.committed == refusing.committed == []


def test_a_stream_that_breaks_commits_nothing_and_ends_running_calls():
    server = Slow("s")

    def made(number: int) -> None:
        if number == 3:
            raise DivergedError("weight w03 was pushed with NaN")

    with pytest.raises(DivergedError, match="w03"):
        pushed(server, made=made)
    assert server.committed == []


def test_mixed_formats_lie_in_one_file_at_multiples_of_their_width():
    tensors = {
        "a": torch.arange(3, dtype=torch.bfloat16),
        "b": torch.tensor(2.5),
        "c": torch.zeros(0, 4, dtype=torch.float16),
        "d": torch.arange(4, dtype=torch.float32).reshape(2, 2).t(),
    }
    with weight_parts(
        tensors.items(), folder=WeightsFolder(None), push="p", bucket_bytes=1 << 20
    ) as parts:
        (content,) = [
            b"".join(bytes(p) for chunk in part.chunks(7) for p in chunk.pieces) for part in parts
        ]
    loaded = load(content)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
