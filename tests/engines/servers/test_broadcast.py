"""Weights sent to all servers at once arrive, and whatever breaks, a push is whole or none."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch

from moe_replay.engines.fake import FakeEngine
from moe_replay.engines.serve import transfer
from moe_replay.engines.servers import broadcast, own
from moe_replay.engines.servers.broadcast import Broadcast
from moe_replay.engines.servers.own import ServerCalls
from moe_replay.engines.servers.push_files import WeightPart, WeightsFolder
from moe_replay.engines.transfer_group import TransferGroup, check_backend, open_store
from moe_replay.errors import DivergedError, EngineError, RecipeError

from ...support.served import served
from ..server_case import SAMPLING, client, requests

NAMES = [f"w{n}" for n in range(6)]
SHAPES = {name: (5, 3) for name in NAMES}
BUCKET = 2 * 5 * 3 * 4
"""Bytes of two tensors: a push has three parts."""


def facts() -> Any:
    from dataclasses import replace

    from ..server_case import FACTS

    return replace(FACTS, weight_shapes=SHAPES)


class Holding(FakeEngine):
    """Remembers what was loaded, by policy version."""

    def __init__(self) -> None:
        super().__init__(weight_shapes=SHAPES)
        self.held: list[dict[str, torch.Tensor]] = []

    def load_weights(self, pushed: Any, *, policy_version: int) -> None:
        kept = [(name, tensor.clone()) for name, tensor in pushed]
        super().load_weights(iter(kept), policy_version=policy_version)
        self.held.append(dict(kept))


def weights(version: int) -> Iterator[tuple[str, torch.Tensor]]:
    for number, name in enumerate(NAMES):
        yield name, torch.arange(15.0).reshape(5, 3) + 100 * version + number


def is_version(held: dict[str, torch.Tensor], version: int) -> bool:
    return all(torch.equal(held[name], tensor) for name, tensor in weights(version))


@contextmanager
def pushing(*urls: str, backend: str = "gloo") -> Iterator[Any]:
    engine = client(*urls, facts=facts(), bucket_bytes=BUCKET, weight_transfer=backend)
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send each part of some 200 bytes in several chunks."""
    for module in (transfer, broadcast, own):
        monkeypatch.setattr(module, "MAX_CHUNK_BYTES", 100)


@contextmanager
def two_servers() -> Iterator[tuple[list[Holding], list[str]]]:
    engines = [Holding(), Holding()]
    with ExitStack() as scope:
        yield engines, [scope.enter_context(served(engine)) for engine in engines]


def test_every_server_loads_what_was_sent_once_to_all():
    with two_servers() as (engines, urls), pushing(*urls) as engine:
        for version in (1, 2):
            engine.load_weights(weights(version), policy_version=version)
            assert all(is_version(each.held[-1], version) for each in engines)
        # All three parts of both pushes, in one group.
        assert engine._broadcast.num_sent == 6
        assert sum(engine.faults.values()) == 0
        groups = engine.generate(requests(8), SAMPLING)
        assert {c.policy_version for g in groups for c in g.completions} == {2}


def test_control_without_the_group_nothing_goes_through_it():
    with two_servers() as (engines, urls), pushing(*urls, backend="auto") as engine:
        engine.load_weights(weights(1), policy_version=1)
        assert engine._broadcast is None
        assert all(is_version(each.held[-1], 1) for each in engines)


def test_a_part_damaged_in_transit_is_sent_again_over_http(monkeypatch):
    real, sent = TransferGroup.broadcast, []

    def flipping(group: TransferGroup, buffer: Any) -> None:
        if group._rank == 0:
            sent.append(len(buffer))
            # The third chunk of the second part.
            if len(sent) == 6:
                buffer = buffer.copy()
                buffer[0] ^= 1
        real(group, buffer)

    monkeypatch.setattr(TransferGroup, "broadcast", flipping)
    with two_servers() as (engines, urls), pushing(*urls) as engine:
        engine.load_weights(weights(1), policy_version=1)
        assert all(is_version(each.held[-1], 1) for each in engines)
        # Both servers noticed.
        assert engine.faults["failed"] == 2
        assert engine._broadcast.num_sent == 2
        # The next push has a new group.
        engine.load_weights(weights(2), policy_version=2)
        assert all(is_version(each.held[-1], 2) for each in engines)
        assert engine._broadcast.num_sent == 5


def test_a_server_that_loses_the_group_takes_the_rest_over_http(monkeypatch):
    real, received = TransferGroup.broadcast, []

    def losing(group: TransferGroup, buffer: Any) -> None:
        if group._rank == 2:
            received.append(len(buffer))
            if len(received) == 4:
                raise EngineError("the network of this server is gone")
        real(group, buffer)

    monkeypatch.setattr(TransferGroup, "broadcast", losing)
    with two_servers() as (engines, urls), pushing(*urls) as engine:
        engine.load_weights(weights(1), policy_version=1)
        assert all(is_version(each.held[-1], 1) for each in engines)
        assert engine.faults["failed"] >= 1
        assert not engine._broadcast.is_formed
        engine.load_weights(weights(2), policy_version=2)
        assert all(is_version(each.held[-1], 2) for each in engines)
        assert engine._broadcast.is_formed


_SERVER = """
import sys
from tests.engines.servers.test_broadcast import Holding
from tests.support.served import served
with served(Holding()) as url:
    print(url, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("dies_at", [0, 3])
def test_a_server_killed_in_the_middle_is_dropped_and_the_others_load(dies_at, monkeypatch):
    # The process of the server has chunks of 64 MiB, so parts have one chunk here too.
    for module in (transfer, broadcast, own):
        monkeypatch.setattr(module, "MAX_CHUNK_BYTES", 64 << 20)
    with subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as doomed:
        assert doomed.stdout is not None
        other = doomed.stdout.readline().strip()
        living = Holding()
        with served(living) as url, pushing(url, other) as engine:
            engine.load_weights(weights(1), policy_version=1)
            assert engine._broadcast.num_sent == 3

            def stream() -> Iterator[tuple[str, torch.Tensor]]:
                for number, pair in enumerate(weights(2)):
                    if number == dies_at:
                        os.kill(doomed.pid, signal.SIGKILL)
                        doomed.wait()
                    yield pair

            engine.load_weights(stream(), policy_version=2)
            assert is_version(living.held[-1], 2)
            assert engine._holders == {url}
            assert sum(engine.faults.values()) >= 1
            # Without it the next group has one server.
            engine.load_weights(weights(3), policy_version=3)
            assert is_version(living.held[-1], 3)


def test_a_stream_that_breaks_leaves_every_server_with_the_weights_before():
    with two_servers() as (engines, urls), pushing(*urls) as engine:
        engine.load_weights(weights(1), policy_version=1)
        broken = list(weights(2))
        broken[3] = ("w3", torch.full((5, 3), float("nan")))
        with pytest.raises(DivergedError, match="w3"):
            engine.load_weights(iter(broken), policy_version=2)
        assert all(is_version(each.held[-1], 1) for each in engines)
        engine.load_weights(weights(2), policy_version=2)
        assert all(is_version(each.held[-1], 2) for each in engines)


def test_nccl_is_refused_where_there_is_none():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    check_backend("gloo")
    with pytest.raises(RecipeError, match=r"over NCCL .* set rollout.weight_transfer to 'gloo'"):
        check_backend("nccl")
    with two_servers() as (_, urls), pytest.raises(RecipeError, match="NCCL"):
        client(*urls, facts=facts(), weight_transfer="nccl")


def test_a_server_refuses_a_transport_that_it_does_not_have(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    # As of a trainer with a GPU.
    monkeypatch.setattr(broadcast, "check_backend", lambda backend: None)
    with (
        two_servers() as (engines, urls),
        pushing(*urls, backend="nccl") as engine,
        pytest.raises(EngineError, match="/transfers refuses the call: weights cannot be sent"),
    ):
        engine.load_weights(weights(1), policy_version=1)
    assert all(not each.held for each in engines)


def server_of(url: str) -> ServerCalls:
    """Return the calls to a server, none of which is made."""
    return ServerCalls(url, token=None, timeout_s=1.0, max_answer_bytes=1 << 20)


def connects(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=10).close()
    except ConnectionRefusedError:
        return False
    return True


def test_a_group_with_servers_on_loopback_is_met_there_alone(monkeypatch):
    stores: list[Any] = []

    def opened(*given: Any) -> Any:
        stores.append(open_store(*given))
        return stores[-1]

    monkeypatch.setattr(broadcast, "open_store", opened)
    with two_servers() as (_, urls), pushing(*urls) as engine:
        engine.load_weights(weights(1), policy_version=1)
        assert engine._broadcast.num_sent == 3
        (store,) = stores
        assert connects("127.0.0.1", store.port)
        # Another address of this machine: a store on all addresses answers there too.
        assert not connects("127.0.0.2", store.port)
        with socket.create_server(("0.0.0.0", 0)) as everywhere:
            assert connects("127.0.0.2", everywhere.getsockname()[1])


def test_the_group_is_met_where_the_servers_of_other_machines_reach_it(monkeypatch):
    own_addresses = {"127.0.0.1": "127.0.0.1", "::1": "::1", "node7": "10.0.0.5"}
    monkeypatch.setattr(broadcast, "own_address", own_addresses.__getitem__)

    def met(*urls: str) -> str:
        return broadcast._address_for([server_of(url) for url in urls])

    assert met("http://127.0.0.1:1", "http://[::1]:2") == "127.0.0.1"
    assert met("http://[::1]:2") == "::1"
    assert met("http://127.0.0.1:1", "http://node7:1") == "10.0.0.5"


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_a_group_is_refused_beside_tls(backend):
    servers = [server_of("http://a:1"), server_of("HTTPS://b:2")]
    with pytest.raises(RecipeError, match=r"(?i)'(gloo|nccl)', and https://b:2 has TLS, .* 'auto'"):
        Broadcast(backend, servers, Counter())
    # Without TLS it is not.
    Broadcast("gloo", servers[:1], Counter())


class LeftOutsideTheLock(Broadcast):
    """Another thread leaves whenever the group is looked at without the lock."""

    held: Any = None

    @property
    def _group(self) -> Any:
        seen = self.held
        if seen is not None and not self._turn._is_owned():  # type: ignore[attr-defined]
            self.leave()
        return seen

    @_group.setter
    def _group(self, group: Any) -> None:
        self.held = group


def alone(kind: type[Broadcast]) -> tuple[Any, Any, TransferGroup]:
    """Return a broadcast with its one server, and its group, which has no other rank."""
    server = server_of("http://a")
    group = TransferGroup("gloo", open_store("127.0.0.1"), rank=0, size=1, address="127.0.0.1")
    made: Any = kind("gloo", [], Counter())
    made._members, made._group = {server.url: server}, group
    return made, server, group


def part() -> WeightPart:
    return WeightPart(0, [memoryview(b"part")], WeightsFolder(None), "push")


def test_who_sends_does_not_look_for_the_group_that_another_thread_left():
    made, server, _ = alone(LeftOutsideTheLock)
    made._meet(server, part())
    assert made._outcomes == {0: True}
    assert made.num_sent == 1


def test_a_group_that_was_left_while_a_part_was_sent_is_closed(monkeypatch):
    made, server, group = alone(Broadcast)
    real = TransferGroup.broadcast

    def left(group: TransferGroup, buffer: Any) -> None:
        made.leave()
        real(group, buffer)

    monkeypatch.setattr(TransferGroup, "broadcast", left)
    made._meet(server, part())
    assert made.num_sent == 1
    assert group._group is None
