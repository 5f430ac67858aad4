"""Servers that fail on purpose, for tests of whatever must survive that.

In: an ASGI application, or the URL of a server. Out: one that dies, stalls, fails, and damages its answers. Called by: tests, ours and users'.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx2

FAULTS = ("die", "stall", "fail", "flip", "cut")
"""Ways to fail: break the connection, answer too late, answer 500, flip one bit of the answer, cut it."""

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
        async with httpx2.AsyncClient(timeout=None, trust_env=False) as client:
            answer = await client.request(
                scope["method"],
                f"{self._url}{scope['path']}?{scope['query_string'].decode()}",
                content=body,
                headers=[(name, value) for name, value in scope["headers"] if name != b"host"],
            )
        headers = [(b"content-type", answer.headers.get("content-type", "").encode())]
        await send(
            {"type": "http.response.start", "status": answer.status_code, "headers": headers}
        )
        await send({"type": "http.response.body", "body": answer.content})


class Faulty:
    """An ASGI application that answers some generate calls wrongly, by a seeded choice.

    ``share`` of the calls fail, each in one of ``kinds``; `made` counts them. A stalled call waits ``stall_s`` and then
    gives no answer.

    Example:
        >>> with served(engine, around=lambda application: Faulty(application, FAULTS, share=0.3)) as url: ...
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
        self._random, self._stall_s = random.Random(seed), stall_s
        self.made: Counter[str] = Counter()

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        """Answer one call, or fail to."""
        is_call = scope["type"] == "http" and scope["path"] == "/generate"
        if not is_call or self._random.random() > self._share:
            return await self._application(scope, receive, send)
        kind = self._random.choice(self._kinds)
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
