"""The rollout server: an engine behind HTTP, whose answers name the weights that sampled them.

``GET /status`` says what it is. ``POST /generate`` samples. ``POST /pushes`` begins a push of
weights, ``PUT /pushes/{id}/{part}`` takes its parts in chunks, and ``POST /pushes/{id}/commit``
checks and loads them. ``POST /transfers`` joins a process group with the trainer; parts that come
through it are announced by ``POST /pushes/{id}/{part}/receive``, and ``/received`` waits for them.
Sampling and loading are answered by frames, which report progress. If a bearer token is set,
nothing is answered without it; all that a caller may send or hold is limited, and nothing is
unpickled.

In: an engine. Out: an ASGI application.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from moe_replay.checkpoint.facts import ModelFacts
from moe_replay.engines.checks import check_requests, check_sampling
from moe_replay.engines.serve.access import (
    BAD_REQUEST,
    FAILED,
    STALE,
    UNAVAILABLE,
    Access,
    Bodies,
    RefusedError,
    status_of,
    text_of,
)
from moe_replay.engines.serve.calls import LOG, FrameAnswer, Tally, Turns
from moe_replay.engines.serve.engine import PushRefused, ServedEngine, in_thread, to_its_end
from moe_replay.engines.serve.messages import (
    CHECKPOINT,
    LOADING,
    MAX_CHUNK_BYTES,
    PROTOCOL,
    GenerateCall,
    PartTransfer,
    PolicyName,
    PushCommit,
    PushStart,
    Status,
    TransferStart,
    groups_bytes,
    read_message,
)
from moe_replay.engines.serve.pushes import (
    Push,
    Pushes,
    check_tensors,
    largest_push,
    superseded,
)
from moe_replay.engines.serve.transfer import Transfers
from moe_replay.engines.types import Completion, grouped
from moe_replay.engines.types import Request as RolloutRequest
from moe_replay.errors import EngineError, MoeReplayError

_Endpoint = Callable[[HttpRequest], Awaitable[Any]]

# Completions that one call may ask for: each is a task.
_MAX_COMPLETIONS = 1 << 16
_MAX_COMMIT_BYTES = 16 << 20
# What a push may hold where the model's own size is not known.
_MAX_PUSH_BYTES = 1 << 40
_INT32_MAX = (1 << 31) - 1


class EngineServer:
    """What a server holds: its engine, the name of its weights, and the push that comes in.

    ``facts`` are what requests and pushes are held to before the engine sees them; None leaves that
    to the engine, whose refusals count as failures then. Pushes lie in ``push_folder``. A push
    waits at most ``drain_s`` for running completions to end; those of callers that left are
    cancelled already. Call `ready` once the engine has started.
    """

    def __init__(
        self,
        engine: ServedEngine,
        *,
        facts: ModelFacts | None,
        push_folder: Path,
        token: str | None = None,
        allowed_hosts: Collection[str] = (),
        bodies: Bodies | None = None,
        max_call_bytes: int = 64 << 20,
        drain_s: float = 3600.0,
        progress_s: float = 1.0,
    ) -> None:
        self._engine, self._facts = engine, facts
        self._access = Access(token=token, allowed_hosts=allowed_hosts)
        self._bodies = bodies or Bodies()
        self._max_call_bytes, self._progress_s = max_call_bytes, progress_s
        self._policy = PolicyName(run=CHECKPOINT, policy_version=0)
        max_bytes = _MAX_PUSH_BYTES if facts is None else largest_push(facts)
        self._pushes = Pushes(push_folder, max_bytes=max_bytes)
        self._transfers = Transfers(self._pushes.receiver)
        self._turns = Turns(drain_s)
        self._jobs: set[asyncio.Task[Any]] = set()
        self._closed_because: str | None = LOADING

    def application(self) -> Starlette:
        """Return the ASGI application."""
        return Starlette(
            routes=[
                Route("/status", self._guarded(self._status), methods=["GET"]),
                Route("/generate", self._guarded(self._generate), methods=["POST"]),
                Route("/pushes", self._guarded(self._begin), methods=["POST"]),
                Route("/transfers", self._guarded(self._join), methods=["POST"]),
                Route(
                    "/pushes/{push}/{part:int}/receive",
                    self._guarded(self._receive),
                    methods=["POST"],
                ),
                Route(
                    "/pushes/{push}/{part:int}/received",
                    self._guarded(self._received),
                    methods=["POST"],
                ),
                Route("/pushes/{push}/commit", self._guarded(self._commit), methods=["POST"]),
                Route("/pushes/{push}/{part:int}", self._guarded(self._take), methods=["PUT"]),
            ]
        )

    def ready(self) -> None:
        """Answer calls from now on."""
        self._closed_because = None

    def stop(self, because: str = "the server is stopping") -> None:
        """Refuse calls from now on, and end those that run: their callers are told ``because``."""
        self._closed_because = because
        self._bodies.stop()
        for job in self._jobs:
            job.cancel()

    def _guarded(self, endpoint: _Endpoint) -> _Endpoint:
        """Check who calls, and turn errors into answers."""

        async def answer(request: HttpRequest) -> Any:
            try:
                # Whether it answers at all is public: a caller that waits may have no token.
                if self._closed_because is not None:
                    raise RefusedError(UNAVAILABLE, self._closed_because)
                self._access.check(request.method, request.headers)
                return await endpoint(request)
            except ClientDisconnect:
                client = request.client
                LOG.warning("%s left while it sent %s", client and client.host, request.url.path)
                return Response(status_code=BAD_REQUEST)
            except MoeReplayError as error:
                return PlainTextResponse(text_of(error), status_of(error))

        return answer

    async def _status(self, request: HttpRequest) -> Response:
        status = Status(
            protocol=PROTOCOL,
            description=self._engine.description,
            policy=self._policy,
            crosses_pushes=self._engine.crosses_pushes,
        )
        return Response(status.model_dump_json(), media_type="application/json")

    async def _generate(self, request: HttpRequest) -> FrameAnswer:
        body = await self._bodies.whole(request, self._max_call_bytes)
        call = read_message(GenerateCall, body)
        requests = call.engine_requests()
        self._check_call(call, requests)
        if call.crosses and not self._engine.crosses_pushes:
            raise RefusedError(
                BAD_REQUEST,
                "the call may cross a push, and this server's engine ends what it samples first; "
                "set rollout.push_in_flight = false, or serve with vLLM",
            )
        if not self._turns.is_closed:
            self._policy_for(call)
        tally = Tally()
        return self._streamed(partial(self._sample, call, requests, tally), tally)

    async def _begin(self, request: HttpRequest) -> Response:
        start = read_message(PushStart, await self._bodies.whole(request, 1 << 12))
        await self._pushes.begin(start.push)
        return PlainTextResponse("begun")

    async def _take(self, request: HttpRequest) -> Response:
        numbers = {}
        for name in ("offset", "crc32"):
            text = request.query_params.get(name, "")
            if not (text.isascii() and text.isdecimal() and len(text) < 20):
                raise RefusedError(BAD_REQUEST, f"{name} is {text!r}, expected a number")
            numbers[name] = int(text)
        pieces = self._bodies.pieces(request, MAX_CHUNK_BYTES)
        path = request.path_params
        await self._pushes.take(path["push"], path["part"], **numbers, pieces=pieces)
        return PlainTextResponse("kept")

    async def _join(self, request: HttpRequest) -> Response:
        body = await self._bodies.whole(request, 1 << 12)
        self._transfers.join(read_message(TransferStart, body))
        return PlainTextResponse("joining")

    async def _receive(self, request: HttpRequest) -> Response:
        message = read_message(PartTransfer, await self._bodies.whole(request, _MAX_COMMIT_BYTES))
        path = request.path_params
        await self._transfers.begin(path["push"], path["part"], message)
        return PlainTextResponse("receiving")

    async def _received(self, request: HttpRequest) -> Response:
        path = request.path_params
        await self._transfers.end(path["push"], path["part"])
        return PlainTextResponse("kept")

    async def _commit(self, request: HttpRequest) -> FrameAnswer:
        commit = read_message(PushCommit, await self._bodies.whole(request, _MAX_COMMIT_BYTES))
        if commit.policy.run == CHECKPOINT:
            raise RefusedError(
                BAD_REQUEST,
                f"a run is called {CHECKPOINT!r}, the name for the weights that a server started "
                "with; choose another name",
            )
        push = self._pushes.current(request.path_params["push"])
        if push.loading is not None:
            raise RefusedError(STALE, f"push {push.push_id} is being committed already")
        push.check_complete(commit)
        tally = Tally(doing="checking")
        return self._streamed(partial(self._load, push, commit.policy, tally), tally)

    def _streamed(self, work: Callable[[], Awaitable[bytes]], tally: Tally) -> FrameAnswer:
        async def job() -> bytes:
            task = asyncio.current_task()
            assert task is not None
            self._jobs.add(task)
            try:
                return await work()
            finally:
                self._jobs.discard(task)

        return FrameAnswer(
            job,
            tally=tally,
            ending=lambda: self._closed_because or "the call was ended",
            pause_s=self._progress_s,
        )

    def _check_call(self, call: GenerateCall, requests: list[RolloutRequest]) -> None:
        """Raise `RefusedError` for what no server of this model could answer."""
        sampling = call.sampling
        if (count := sum(r.num_generations for r in requests)) > _MAX_COMPLETIONS or not count:
            raise RefusedError(
                BAD_REQUEST,
                f"the call asks for {count} completions, expected 1 to {_MAX_COMPLETIONS}",
            )
        check_sampling(sampling)
        vocab_size = _INT32_MAX if self._facts is None else self._facts.vocab_size
        if sampling.top_k > _INT32_MAX or any(
            not 0 <= token < vocab_size for token in sampling.stop_token_ids
        ):
            raise RefusedError(
                BAD_REQUEST,
                f"sampling.top_k is {sampling.top_k} and stop_token_ids "
                f"{sampling.stop_token_ids[:8]}, expected at most {_INT32_MAX}, and ids from 0 to "
                f"{vocab_size - 1}",
            )
        try:
            check_requests(
                requests, sampling, description=self._engine.description, vocab_size=vocab_size
            )
        except EngineError as error:
            raise RefusedError(BAD_REQUEST, str(error)) from error

    def _policy_for(self, call: GenerateCall) -> PolicyName:
        """Return the name of the current weights, if they may answer a call."""
        held, wanted = self._policy, call.policy
        if not held.may_answer(wanted, newer=call.crosses):
            raise RefusedError(
                STALE,
                f"this server holds the weights of policy version {held.policy_version} of {held.run}, "
                f"the call asks for {wanted.policy_version} of {wanted.run}; push them",
            )
        return held

    async def _sample(
        self, call: GenerateCall, requests: list[RolloutRequest], tally: Tally
    ) -> bytes:
        """Sample all completions of a call at once, one task each, and return the result."""
        tally.doing = "waiting"
        turn = self._turns.crossing if call.crosses else self._turns.sampling

        async def across() -> int:
            await self._turns.opened()
            return self._policy_for(call).policy_version

        crossing = {"across": across} if call.crosses else {}
        async with turn():
            tally.doing = "sampling"
            policy = self._policy_for(call)

            async def complete(request: RolloutRequest, number: int) -> Completion:
                completion = await self._engine.complete(
                    request,
                    number,
                    call.sampling,
                    # A push may have come since the call did.
                    policy_version=await across() if call.crosses else policy.policy_version,
                    progress=partial(tally.grow, (request.request_id, number)),
                    **crossing,
                )
                tally.num_finished += 1
                return completion

            try:
                async with asyncio.TaskGroup() as tasks:
                    running = [
                        tasks.create_task(complete(request, number))
                        for request in requests
                        for number in range(request.num_generations)
                    ]
            except BaseExceptionGroup as group:
                # The others were cancelled because of it.
                raise group.exceptions[0] from None
            if call.crosses:
                policy = self._policy_for(call)
        groups = grouped(requests, (task.result() for task in running))
        return await in_thread(lambda: groups_bytes(groups, policy))

    async def _load(self, push: Push, policy: PolicyName, tally: Tally) -> bytes:
        """Check a push, wait for running completions, and load it everywhere or nowhere."""
        push.loading = asyncio.current_task()
        try:
            await in_thread(partial(check_tensors, push.folder, self._facts))
            await self._engine.stage(push.folder)
            tally.doing = "waiting"
            async with self._turns.alone():
                push.check_current()
                tally.doing = "loading"
                self._pushes.release(push)
                if self._turns.num_crossing:
                    await self._engine.interrupt()
                await to_its_end(self._apply(push, policy))
        except asyncio.CancelledError:
            if push.is_superseded:
                raise superseded(push.push_id) from None
            raise
        finally:
            if not push.is_loaded:
                await self._pushes.drop(push)
        return policy.model_dump_json().encode()

    async def _apply(self, push: Push, policy: PolicyName) -> None:
        try:
            await self._engine.apply(push.folder)
        except PushRefused:
            raise
        except EngineError as error:
            # Neither the old weights nor the new: no call matches this name until a push succeeds.
            self._policy = PolicyName(run="a push that failed", policy_version=0)
            raise RefusedError(FAILED, f"the engine is broken: {error}") from error
        self._policy, push.is_loaded = policy, True
