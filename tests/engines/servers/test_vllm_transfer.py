"""Weights sent through vLLM's weight-transfer API: the calls, their order, and what breaks them.

The server is a small application with vLLM's paths, whose workers take tensors over gloo in the
order that they were told; NCCL itself is checked in tests/gpu.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from moe_replay.engines.serve.messages import PolicyName
from moe_replay.engines.servers import broadcast
from moe_replay.engines.servers.broadcast import Broadcast
from moe_replay.engines.servers.faults import Fault
from moe_replay.engines.servers.push import push
from moe_replay.engines.servers.push_files import WeightsFolder
from moe_replay.engines.servers.vllm import VllmCalls
from moe_replay.engines.transfer_group import TransferGroup, join_store
from moe_replay.engines.vllm_group import VllmGroup
from moe_replay.errors import EngineError, RecipeError

from ...support.served import listening
from ..server_case import FACTS, LIMIT_S

TENSORS = {
    f"w{n}": (torch.arange(12.0).reshape(3, 4) + 100 * n).to(
        torch.bfloat16 if n % 2 else torch.float32
    )
    for n in range(6)
}


class GlooEnd(VllmGroup):
    """The trainer's end over gloo, in place of vLLM's NCCL communicator."""

    def __init__(self, *, address: str, port: int, size: int) -> None:
        from datetime import timedelta

        store = torch.distributed.TCPStore(
            address, port, None, True, wait_for_workers=False, timeout=timedelta(seconds=60)
        )
        self._inner = TransferGroup("gloo", store, rank=0, size=size, address=address)

    def send(self, tensors: Any) -> None:
        for tensor in tensors:
            self._inner.broadcast(tensor.reshape(-1).view(torch.uint8).numpy().copy())

    def close(self) -> None:
        self._inner.close()


class Worker:
    """One rank of vLLM, with the checks that vLLM's has."""

    def __init__(self) -> None:
        self.group: TransferGroup | None = None
        self.active = False
        self.loaded: dict[str, torch.Tensor] = {}
        self.held: dict[str, torch.Tensor] = {}

    def init(self, rank: int, told: dict[str, Any]) -> None:
        address = told["master_address"]
        self.group = TransferGroup(
            "gloo",
            join_store(address, told["master_port"]),
            rank=told["rank_offset"] + rank,
            size=told["world_size"],
            address=address,
        )

    def update(self, told: dict[str, Any]) -> None:
        assert self.active and self.group is not None
        for name, dtype, shape in zip(
            told["names"], told["dtype_names"], told["shapes"], strict=True
        ):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            buffer = np.empty(tensor.nbytes, dtype=np.uint8)
            self.group.broadcast(buffer)
            self.loaded[name] = torch.from_numpy(buffer).view(tensor.dtype).reshape(shape)


class FakeVllm:
    """An application with vLLM's paths for weights."""

    def __init__(self, *, workers: int = 2, backend: str | None = "nccl") -> None:
        self.workers = [Worker() for _ in range(workers)]
        self.backend, self.version, self.calls = backend, "default", []
        self.fails: Callable[[str, dict[str, Any]], bool] = lambda path, body: False

    def application(self) -> Starlette:
        paths = {
            **{path: "GET" for path in ("/weight_info", "/get_world_size", "/server_info")},
            **{
                path: "POST"
                for path in (
                    *("/pause", "/resume", "/update_weight_version", "/reset_prefix_cache"),
                    *("/init_weight_transfer_engine", "/start_weight_update", "/update_weights"),
                    "/finish_weight_update",
                )
            },
        }
        return Starlette(
            routes=[Route(path, self.answer, methods=[method]) for path, method in paths.items()]
        )

    async def answer(self, request: Request) -> JSONResponse:
        path, raw = request.url.path, await request.body()
        body = json.loads(raw) if raw else {}
        if request.method == "POST":
            self.calls.append(path)
        if self.fails(path, body):
            return JSONResponse({"error": "a worker raised"}, status_code=500)
        return JSONResponse(await asyncio.to_thread(self.act, path, body))

    def act(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/weight_info":
            return {"weight_version": self.version}
        if path == "/get_world_size":
            return {"world_size": len(self.workers)}
        if path == "/server_info":
            config = None if self.backend is None else {"backend": self.backend}
            return {"vllm_config": {"weight_transfer_config": config}}
        if path == "/update_weight_version":
            self.version = body["new_version"]
        elif path == "/reset_prefix_cache":
            return {"success": True}
        elif path == "/init_weight_transfer_engine":
            self.everywhere(lambda n, w: w.init(n, body["init_info"]))
        elif path == "/start_weight_update":
            for worker in self.workers:
                assert not worker.active
                worker.active, worker.loaded = True, {}
        elif path == "/update_weights":
            self.everywhere(lambda n, w: w.update(body["update_info"]))
        elif path == "/finish_weight_update":
            for worker in self.workers:
                assert worker.active
                worker.active, worker.held = False, worker.loaded
        return {}

    def everywhere(self, call: Callable[[int, Worker], None]) -> None:
        failures: list[BaseException] = []

        def run(number: int, worker: Worker) -> None:
            try:
                call(number, worker)
            except Exception as error:  # noqa: BLE001 - raised below
                failures.append(error)

        threads = [
            threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(self.workers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]

    def holds(self, scale: float) -> bool:
        return all(
            w.held.keys() == TENSORS.keys()
            and all(torch.equal(w.held[name], scale * tensor) for name, tensor in TENSORS.items())
            for w in self.workers
        )


@pytest.fixture(autouse=True)
def gloo_in_place_of_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this machine pass for one with NCCL."""
    monkeypatch.setattr(broadcast, "check_backend", lambda backend: None)
    monkeypatch.setattr(broadcast, "VllmGroup", GlooEnd)


@contextmanager
def connected(*fakes: FakeVllm) -> Iterator[tuple[list[VllmCalls], Counter[Fault]]]:
    with ExitStack() as scope:
        servers = []
        for fake in fakes:
            url = scope.enter_context(listening(fake.application()))
            calls = VllmCalls(
                url, token=None, timeout_s=LIMIT_S, max_answer_bytes=1 << 20, facts=FACTS
            )
            scope.callback(calls.close)
            servers.append(calls)
        yield servers, Counter()


def pushed(
    servers: list[VllmCalls],
    faults: Counter[Fault],
    way: Broadcast,
    version: int,
    *,
    made: Callable[[int], None] = lambda number: None,
) -> Any:
    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for number, (name, tensor) in enumerate(TENSORS.items()):
            made(number)
            yield name, version * tensor

    return push(
        stream(),
        PolicyName(run="r", policy_version=version),
        servers,
        folder=WeightsFolder(None),
        num_bytes=0,
        bucket_bytes=100,
        must_reach_all=False,
        faults=faults,
        broadcast=way,
    )


def test_all_workers_of_all_servers_take_the_tensors_in_the_order_that_they_were_told():
    fakes = [FakeVllm(workers=2), FakeVllm(workers=1)]
    with connected(*fakes) as (servers, faults):
        way = Broadcast("nccl", servers, faults)
        for version in (1, 2):
            result = pushed(servers, faults, way, version)
            assert len(result.urls) == 2
            assert all(fake.holds(version) for fake in fakes)
            assert [fake.version for fake in fakes] == [f"r:{version}"] * 2
        # Two tensors a part, in three parts; the group was made once.
        assert (way.num_sent, sum(faults.values())) == (6, 0)
        one_push = [
            "/pause",
            "/update_weight_version",
            "/start_weight_update",
            *["/update_weights"] * 3,
            "/finish_weight_update",
            "/reset_prefix_cache",
            "/update_weight_version",
            "/resume",
        ]
        for fake in fakes:
            assert fake.calls == ["/init_weight_transfer_engine", *one_push, *one_push]
        way.close()


def test_control_tensors_sent_in_another_order_than_told_land_under_wrong_names(monkeypatch):
    sent = GlooEnd.send
    monkeypatch.setattr(GlooEnd, "send", lambda self, ts: sent(self, list(ts)[::-1]))
    # Of equal sizes: nothing but the order tells them apart.
    for name, tensor in list(TENSORS.items()):
        monkeypatch.setitem(TENSORS, name, tensor.float())
    fake = FakeVllm(workers=1)
    with connected(fake) as (servers, faults):
        way = Broadcast("nccl", servers, faults)
        pushed(servers, faults, way, 1)
        assert not fake.holds(1)
        way.close()


def test_a_server_whose_workers_fail_in_the_middle_keeps_no_name_and_takes_no_other_push():
    good, bad = FakeVllm(workers=1), FakeVllm(workers=1)
    with connected(good, bad) as (servers, faults):
        way = Broadcast("nccl", servers, faults)
        pushed(servers, faults, way, 1)

        def fails(path: str, body: dict[str, Any]) -> bool:
            if path != "/update_weights" or "w2" not in body["update_info"]["names"]:
                return False
            # A worker that raised is in no group any more.
            bad.workers[0].group.close()
            bad.workers[0].group = None
            return True

        bad.fails = fails
        with pytest.raises(EngineError, match=r"no server took policy version 2: .*replaced some"):
            pushed(servers, faults, way, 2)
        # Half-way through, neither may be sampled from, and both say so.
        assert [fake.version for fake in (good, bad)] == ["moe-replay is loading"] * 2
        assert "/resume" not in good.calls[good.calls.index("/resume") + 1 :]
        with pytest.raises(EngineError, match="start the server again"):
            pushed(servers, faults, way, 3)


def test_a_server_started_without_weight_transfer_is_refused_before_anything_is_replaced():
    fake = FakeVllm(backend=None)
    with connected(fake) as (servers, faults):
        way = Broadcast("nccl", servers, faults)
        with pytest.raises(RecipeError, match="start it with --weight-transfer-config"):
            pushed(servers, faults, way, 1)
        assert fake.calls == [] and fake.version == "default"


def test_plain_vllm_servers_have_no_gloo():
    with (
        connected(FakeVllm()) as (servers, faults),
        pytest.raises(RecipeError, match="plain vLLM servers 'nccl'"),
    ):
        Broadcast("gloo", servers, faults)
