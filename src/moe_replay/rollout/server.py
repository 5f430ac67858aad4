"""The rollout server: an engine behind HTTP, which tells what it can return and by which weights it answers.

``GET /status`` says what it is. ``POST /generate`` samples. ``PUT /weights/{number}`` takes a part of a push and
``POST /weights/commit`` applies all parts. Nothing is answered without the bearer token where one is set, bodies are
limited, and nothing is unpickled.

In: an engine. Out: an ASGI application. Called by: cli.serve, tests.
"""

from __future__ import annotations

import contextlib
import hmac
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

import anyio
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from moe_replay.errors import CodecError, DivergedError, EngineError, MoeReplayError, RecipeError
from moe_replay.rollout.server_messages import (
    CHECKPOINT,
    CONTENT_TYPE,
    PROTOCOL,
    PolicyName,
    Status,
    groups_bytes,
    read_call,
)
from moe_replay.rollout.types import Engine, RolloutGroup, SamplingParams
from moe_replay.rollout.types import Request as RolloutRequest
from moe_replay.routing import Origin

# Calls that run at the same time, each in a thread; further ones wait.
_MAX_CALLS = 256
# Longest wait of a push for running completions to end.
_DRAIN_S = 600.0
_BAD_REQUEST, _UNAUTHORIZED, _STALE, _TOO_LARGE = 400, 401, 409, 413
_WRONG_TYPE, _UNPROCESSABLE, _FAILED = 415, 422, 500


class EngineServer:
    """What a server holds: its engine, the name of its weights, and the parts of a push.

    ``concurrent`` tells that threads may call the engine's `generate` at the same time.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        concurrent: bool,
        token: str | None = None,
        max_call_bytes: int = 64 << 20,
        max_part_bytes: int = 1 << 30,
    ) -> None:
        self._engine = engine
        self._token = token
        self._max_call_bytes, self._max_part_bytes = max_call_bytes, max_part_bytes
        self._policy = PolicyName(run=CHECKPOINT, policy_version=0)
        self._parts: dict[int, bytes] = {}
        self._turn = threading.Condition()
        self._num_running = 0
        self._is_pushing = False
        self._one_at_a_time = contextlib.nullcontext() if concurrent else threading.Lock()

    def application(self) -> Starlette:
        """Return the ASGI application."""
        return Starlette(
            routes=[
                Route("/status", self._guarded(self._status), methods=["GET"]),
                Route("/generate", self._guarded(self._generate), methods=["POST"]),
                Route("/weights/commit", self._guarded(self._commit), methods=["POST"]),
                Route("/weights/{number:int}", self._guarded(self._take_part), methods=["PUT"]),
            ],
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, application: Starlette) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = _MAX_CALLS
        yield

    def _guarded(
        self, endpoint: Callable[[HttpRequest], Awaitable[Response]]
    ) -> Callable[[HttpRequest], Awaitable[Response]]:
        """Ask for the token and the content type, and turn errors into answers."""

        async def answer(request: HttpRequest) -> Response:
            if self._token is not None:
                given = request.headers.get("authorization", "").encode()
                if not hmac.compare_digest(given, f"Bearer {self._token}".encode()):
                    return PlainTextResponse("a bearer token is required", _UNAUTHORIZED)
            if request.method != "GET" and request.headers.get("content-type") != CONTENT_TYPE:
                return PlainTextResponse(f"content-type must be {CONTENT_TYPE}", _WRONG_TYPE)
            try:
                return await endpoint(request)
            except (CodecError, RecipeError) as error:
                return PlainTextResponse(str(error), _BAD_REQUEST)
            except DivergedError as error:
                # No retry would change it.
                return PlainTextResponse(str(error), _UNPROCESSABLE)
            except _TooLargeError as error:
                return PlainTextResponse(str(error), _TOO_LARGE)
            except _StaleError as error:
                return PlainTextResponse(str(error), _STALE)
            except MoeReplayError as error:
                return PlainTextResponse(f"{type(error).__name__}: {error}", _FAILED)

        return answer

    async def _status(self, request: HttpRequest) -> Response:
        status = Status(
            protocol=PROTOCOL, description=self._engine.description, policy=self._policy
        )
        return Response(status.model_dump_json(), media_type="application/json")

    async def _generate(self, request: HttpRequest) -> Response:
        call = read_call(await _body(request, self._max_call_bytes))
        body = await anyio.to_thread.run_sync(
            self._sample, call.engine_requests(), call.sampling, call.policy
        )
        return Response(body, media_type=CONTENT_TYPE)

    async def _take_part(self, request: HttpRequest) -> Response:
        number = request.path_params["number"]
        body = await _body(request, self._max_part_bytes)
        if number == 0:
            self._parts.clear()
        if number != len(self._parts):
            raise CodecError(
                f"part {number} of a push came after {len(self._parts)} parts, expected them in order from 0; "
                "two trainers are pushing"
            )
        self._parts[number] = body
        return PlainTextResponse("kept")

    async def _commit(self, request: HttpRequest) -> Response:
        try:
            policy = PolicyName.model_validate_json(await _body(request, 1 << 12))
        except ValidationError as error:
            raise CodecError(f"the body is no name of a policy: {error}") from error
        await anyio.to_thread.run_sync(self._load, policy)
        return PlainTextResponse("loaded")

    def _sample(
        self, requests: list[RolloutRequest], sampling: SamplingParams, wanted: PolicyName
    ) -> bytes:
        with self._turn:
            self._turn.wait_for(lambda: not self._is_pushing, timeout=_DRAIN_S)
            policy = self._policy
            at_start = policy.run == CHECKPOINT and wanted.policy_version == 0
            if wanted != policy and not at_start:
                raise _StaleError(
                    f"this server holds the weights of policy version {policy.policy_version} of {policy.run}, the call asks "
                    f"for {wanted.policy_version} of {wanted.run}; push them"
                )
            self._num_running += 1
        try:
            with self._one_at_a_time:
                groups = self._engine.generate(requests, sampling)
        finally:
            with self._turn:
                self._num_running -= 1
                self._turn.notify_all()
        return groups_bytes([_under(group, policy) for group in groups], policy)

    def _load(self, policy: PolicyName) -> None:
        with self._turn:
            self._is_pushing = True
            try:
                if not self._turn.wait_for(lambda: self._num_running == 0, timeout=_DRAIN_S):
                    raise EngineError(
                        f"{self._num_running} completions were still running {_DRAIN_S:.0f} s after a push came"
                    )
                # The engine counts every push that it ever got; runs count their own.
                self._engine.load_weights(
                    self._tensors(), policy_version=self._engine.policy_version + 1
                )
                self._policy = policy
            finally:
                self._is_pushing = False
                self._parts.clear()
                self._turn.notify_all()

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for number in sorted(self._parts):
            try:
                yield from load_tensors(self._parts[number]).items()
            except SafetensorError as error:
                raise CodecError(f"part {number} of a push is damaged: {error}") from error
            self._parts[number] = b""


class _TooLargeError(MoeReplayError):
    """A body exceeds its limit."""


class _StaleError(MoeReplayError):
    """A call names other weights than the server holds."""


async def _body(request: HttpRequest, limit: int) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise _TooLargeError(f"the body exceeds {limit} bytes")
    return bytes(body)


def _under(group: RolloutGroup, policy: PolicyName) -> RolloutGroup:
    """Return the group with the version that the run counts, in place of the engine's."""

    def renamed(completion: Any) -> Any:
        trace = completion.trace
        if trace is not None:
            origin = Origin.single(
                engine=trace.origin.engine,
                engine_version=trace.origin.engine_version,
                policy_version=policy.policy_version,
                num_rows=len(trace),
            )
            trace = replace(trace, origin=origin)
        return replace(completion, trace=trace, policy_version=policy.policy_version)

    return replace(group, completions=tuple(renamed(c) for c in group.completions))
