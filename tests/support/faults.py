"""Servers that fail on purpose, for tests of whatever must survive that.

In: an ASGI application, or the URL of a server. Out: one that dies, stalls, fails, and damages its
answers.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx2

FAULTS = ("die", "stall", "fail", "flip", "cut")
"""Break the connection, be silent, answer 500, flip a bit of each piece, cut each piece."""

Send = Callable[[Any], Awaitable[None]]


class Relay:
    """An ASGI application that passes every call on to the server at ``url``, for `Faulty` to wrap.

    Example:
        >>> with listening(Faulty(Relay(server.url), ["flip"], share=0.3)) as url: ...
    """

    def __init__(self, url: str) -> None:
        self._url = url

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        """Answer one call as the server does."""
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        answer = asyncio.create_task(self._pass_on(scope, body, send))
        left = asyncio.create_task(_departure(receive))
        try:
            await asyncio.wait({answer, left}, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                answer.result()
        finally:
            # A caller that leaves takes its call to the server behind with it.
            for task in (answer, left):
                task.cancel()
            await asyncio.gather(answer, left, return_exceptions=True)

    async def _pass_on(self, scope: Any, body: bytes, send: Send) -> None:
        """Make the call, and send its answer piece by piece as it comes."""
        query = scope["query_string"].decode()
        call = httpx2.Request(
            scope["method"],
            f"{self._url}{scope['path']}" + (f"?{query}" if query else ""),
            content=body,
            headers=[(name, value) for name, value in scope["headers"] if name != b"host"],
        )
        async with httpx2.AsyncClient(timeout=None, trust_env=False) as client:
            answer = await client.send(call, stream=True)
            headers = [(b"content-type", answer.headers.get("content-type", "").encode())]
            await send(
                {"type": "http.response.start", "status": answer.status_code, "headers": headers}
            )
            async for piece in answer.aiter_raw():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


async def _departure(receive: Any) -> None:
    """Return when the caller has left."""
    while (await receive())["type"] != "http.disconnect":
        continue


class Faulty:
    """An ASGI application that answers some generate calls wrongly.

    ``share`` of the calls fail, evenly spread, in each of ``kinds`` in turn; `made` counts them. So
    it is certain how many of so many calls fail, and how. A stalled call is silent for ``stall_s``
    and then gives no answer. Answers that come in pieces are damaged in each of them, in places
    chosen by ``seed``.

    Example:
        >>> faulty = lambda application: Faulty(application, FAULTS, share=0.3)
        >>> with served(engine, around=faulty) as url: ...
    """

    def __init__(
        self,
        application: Any,
        kinds: Sequence[str],
        *,
        share: float,
        seed: int = 0,
        stall_s: float = 1.5,
    ) -> None:
        self._application, self._kinds, self._share = application, tuple(kinds), share
        self._due = 0.0
        self._random, self._stall_s = random.Random(seed), stall_s
        self.made: Counter[str] = Counter()

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        """Answer one call, or fail to."""
        is_call = scope["type"] == "http" and scope["path"] == "/generate"
        self._due += self._share * is_call
        if not is_call or self._due < 1.0:
            return await self._application(scope, receive, send)
        self._due -= 1.0
        kind = self._kinds[self.made.total() % len(self._kinds)]
        self.made[kind] += 1
        if kind == "die":
            raise RuntimeError("this server dies on purpose")
        if kind == "stall":
            return await asyncio.sleep(self._stall_s)
        if kind == "fail":
            await send({"type": "http.response.start", "status": 500, "headers": []})
            return await send({"type": "http.response.body", "body": b"out of memory"})
        return await self._application(scope, receive, self._altered(send, kind))

    def _altered(self, send: Send, kind: str) -> Send:
        async def altered(message: Any) -> None:
            body = bytearray(message.get("body", b""))
            if message["type"] == "http.response.start":
                headers = [h for h in message["headers"] if h[0] != b"content-length"]
                message = {**message, "headers": headers}
            elif body and kind == "flip":
                body[self._random.randrange(len(body))] ^= 1 << self._random.randrange(8)
                message = {**message, "body": bytes(body)}
            elif body:
                message = {**message, "body": bytes(body[: self._random.randrange(len(body))])}
            await send(message)

        return altered
