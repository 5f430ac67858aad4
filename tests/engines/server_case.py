"""A fake engine behind servers, and what is asked of it."""

from __future__ import annotations

import threading
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import torch
from safetensors.torch import save as save_tensors

from moe_replay.checkpoint.facts import ModelFacts
from moe_replay.engines.fake import FakeEngine
from moe_replay.engines.serve.engine import ThreadedEngine
from moe_replay.engines.serve.frames import CONTENT_TYPE, ERROR, last_frame, read_error
from moe_replay.engines.serve.messages import (
    PolicyName,
    PushCommit,
    PushPart,
    PushStart,
    sum_of_sums,
)
from moe_replay.engines.servers.engine import ServerEngine
from moe_replay.engines.servers.own import ServerCalls
from moe_replay.engines.types import Completion, Request, SamplingParams
from moe_replay.routing import RoutedModel

SAMPLING = SamplingParams(max_completion_length=6, seed=3)
SHAPES = {"model.embed_tokens.weight": (4, 2), "lm_head.weight": (4, 2)}
FACTS = ModelFacts(
    vocab_size=32,
    max_context_length=4096,
    eos_ids=(1,),
    routed=RoutedModel(moe_layers=(0, 1), num_decoder_layers=2, num_experts=8, topk=2),
    weight_shapes=SHAPES,
    tied_names=frozenset(),
)
POLICY = PolicyName(run="test", policy_version=0)
HEADERS = {"content-type": CONTENT_TYPE}
# For what hangs, on a machine that is busy with other work.
LIMIT_S = 300.0
OPENED: list[Any] = []
"""What `opened` was given; `tests/engines/conftest.py` closes it when its test is over."""


def fake() -> FakeEngine:
    return FakeEngine(weight_shapes=SHAPES)


def requests(count: int = 6, *, first: int = 0) -> list[Request]:
    rng = np.random.default_rng(first)
    return [
        Request(
            request_id=first + number,
            prompt_ids=rng.integers(4, 32, 5).astype(np.int32),
            num_generations=2,
        )
        for number in range(count)
    ]


def weights(value: float = 1.0) -> list[tuple[str, torch.Tensor]]:
    return [(name, torch.full(shape, value)) for name, shape in SHAPES.items()]


def client(*urls: str, **options: Any) -> ServerEngine:
    fields = {
        "facts": FACTS,
        "run": "test",
        "dtype": "float32",
        "record_routes": True,
        "timeout_s": LIMIT_S,
        **options,
    }
    return opened(ServerEngine(list(urls), **fields))


def opened(thing: Any) -> Any:
    """Return an engine or calls to a server, which is closed after the test at the latest."""
    OPENED.append(thing)
    return thing


def tokens(groups: Any) -> list[list[int]]:
    return [c.token_ids.tolist() for group in groups for c in group.completions]


class HeldEngine(ThreadedEngine):
    """A fake engine whose completions wait until released, and which counts what became of them."""

    def __init__(self) -> None:
        super().__init__(fake)
        self._made = fake()
        self._changed = threading.Condition()
        self._is_released = False
        self.num_running = self.num_cancelled = 0
        self.applied: list[Path] = []

    async def complete(
        self,
        request: Request,
        number: int,
        sampling: SamplingParams,
        *,
        policy_version: int,
        progress: Callable[[int], None],
    ) -> Completion:
        import asyncio

        self._note(running=1)
        try:
            progress(3)
            while not self._is_released:
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self._note(cancelled=1)
            raise
        finally:
            self._note(running=-1)
        return await super().complete(
            request, number, sampling, policy_version=policy_version, progress=progress
        )

    async def apply(self, folder: Path) -> None:
        self.applied.append(folder)
        await super().apply(folder)

    def _note(self, *, running: int = 0, cancelled: int = 0) -> None:
        with self._changed:
            self.num_running += running
            self.num_cancelled += cancelled
            self._changed.notify_all()

    def release(self) -> None:
        """Let completions end."""
        self._is_released = True

    def wait_for(self, holds: Callable[[], bool]) -> None:
        """Return once something holds of the counts."""
        with self._changed:
            assert self._changed.wait_for(holds, timeout=LIMIT_S)


def call(method: str, url: str, content: bytes = b"", **options: Any) -> httpx2.Response:
    """Make one call, as our client does but without its repairs."""
    headers = HEADERS | options.pop("headers", {})
    return httpx2.request(
        method, url, content=content, headers=headers, timeout=LIMIT_S, trust_env=False, **options
    )


def error_of(response: httpx2.Response) -> tuple[int, str]:
    """Return status and text of an answer, as such or inside a stream; 200 for a good one."""
    if response.status_code != 200:
        return response.status_code, response.text
    if response.headers["content-type"] != CONTENT_TYPE:
        return 200, response.text
    kind, payload = last_frame(response.content)
    return read_error(payload) if kind == ERROR else (200, "")


class RawPush:
    """A push, call by call, so that each can be done wrong."""

    def __init__(self, url: str, push_id: str | None = None) -> None:
        self.url, self.push_id = url, push_id or uuid.uuid4().hex
        self.parts: dict[int, list[bytes]] = {}

    def begin(self) -> httpx2.Response:
        start = PushStart(push=self.push_id)
        return call("POST", f"{self.url}/pushes", start.model_dump_json().encode())

    def put(
        self, number: int, chunk: bytes, *, offset: int | None = None, crc32: int | None = None
    ) -> httpx2.Response:
        before = sum(map(len, self.parts.get(number, [])))
        offset = before if offset is None else offset
        crc32 = zlib.crc32(chunk) if crc32 is None else crc32
        url = f"{self.url}/pushes/{self.push_id}/{number}?offset={offset}&crc32={crc32}"
        answer = call("PUT", url, chunk)
        if answer.status_code == 200 and offset == before:
            self.parts.setdefault(number, []).append(chunk)
        return answer

    def commit(self, policy_version: int = 1, *, run: str = "test") -> tuple[int, str]:
        parts = [
            PushPart(num_bytes=sum(map(len, chunks)), sum=sum_of_sums(map(zlib.crc32, chunks)))
            for _, chunks in sorted(self.parts.items())
        ]
        return self.commit_as(
            PushCommit(policy=PolicyName(run=run, policy_version=policy_version), parts=parts)
        )

    def commit_as(self, commit: PushCommit) -> tuple[int, str]:
        url = f"{self.url}/pushes/{self.push_id}/commit"
        return error_of(call("POST", url, commit.model_dump_json().encode()))


def part(tensors: dict[str, torch.Tensor] | None = None) -> bytes:
    """Return a part that holds tensors, by default all of the model."""
    return save_tensors(dict(weights()) if tensors is None else tensors)


def calls_to(url: str) -> ServerCalls:
    return opened(ServerCalls(url, token=None, timeout_s=LIMIT_S, max_answer_bytes=1 << 30))


def policy_of(url: str) -> PolicyName:
    calls = calls_to(url)
    try:
        return calls.status().policy
    finally:
        calls.close()


def pushed(url: str, *, policy_version: int = 1) -> RawPush:
    push = RawPush(url)
    assert push.begin().status_code == 200
    assert push.put(0, part()).status_code == 200
    assert push.commit(policy_version) == (200, "")
    return push
