"""Limits on what a caller may hold of a rollout server: open connections, headers and bodies that do not come.

In: connections, bodies. Out: the same within the limits, or none.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request as HttpRequest

from moe_replay.engines.serve.access import TOO_LARGE, TOO_SLOW, UNAVAILABLE, RefusedError

# A body may be silent this long at its start, and each 64 KiB that came buys one second more: 64 MiB over a slow line of
# 100 KiB/s take 660 s and are fine, a body that drips a byte every second ends after 30 s.
_BODY_S = 30.0
_SLOWEST_BYTES_PER_S = 64 << 10


class Bodies:
    """Reads bodies within limits of size and time, and can be stopped."""

    def __init__(self, *, body_s: float = _BODY_S) -> None:
        self._body_s = body_s
        self._reading: set[asyncio.Task[Any]] = set()
        self._is_stopped = False

    async def pieces(self, request: HttpRequest, limit: int) -> AsyncIterator[bytes]:
        """Yield a body of at most ``limit`` bytes as it arrives.

        Raises:
            RefusedError: when it is longer, does not come, or the server is stopping.
            ClientDisconnect: when its sender has left.
        """
        loop = asyncio.get_running_loop()
        start, size = loop.time(), 0
        stream = request.stream()
        while True:
            deadline = start + self._body_s + size / _SLOWEST_BYTES_PER_S
            try:
                async with asyncio.timeout_at(deadline):
                    piece = await self._next(stream)
            except TimeoutError:
                raise RefusedError(
                    TOO_SLOW,
                    f"the body stopped coming: {size} bytes in {loop.time() - start:.0f} s; send it again",
                ) from None
            if piece is None:
                return
            size += len(piece)
            if size > limit:
                raise RefusedError(TOO_LARGE, f"the body exceeds {limit} bytes")
            yield piece

    async def whole(self, request: HttpRequest, limit: int) -> bytes:
        """Return a body of at most ``limit`` bytes; raises as `pieces`."""
        return b"".join([piece async for piece in self.pieces(request, limit)])

    def stop(self) -> None:
        """End all bodies that are being read, and those that are asked for later."""
        self._is_stopped = True
        for task in self._reading:
            task.cancel()

    async def _next(self, stream: AsyncIterator[bytes]) -> bytes | None:
        """Return the next piece of a body; None at its end."""
        if self._is_stopped:
            raise _stopping()
        task = asyncio.current_task()
        assert task is not None
        self._reading.add(task)
        try:
            return await anext(stream, None)
        except asyncio.CancelledError:
            # Only a task that ends by itself answers; one that the web server cancels goes on to be cancelled.
            if self._is_stopped and task.uncancel() == 0:
                raise _stopping() from None
            raise
        finally:
            self._reading.discard(task)


def _stopping() -> RefusedError:
    return RefusedError(UNAVAILABLE, "the server is stopping")


def limited(
    protocol: type[Any], *, headers_s: float, max_connections: int, say: Callable[[str], None]
) -> type[Any]:
    """Return uvicorn's ``protocol`` with a time limit on the headers of each request, and a bound on connections.

    uvicorn itself limits only the pause between two requests: a connection that sends nothing, or half a header, stays.
    """

    class Limited(protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > max_connections:
                self._end(f"refused: {max_connections} connections are open")
            else:
                self._await_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_timer()
            elif self._timer is None:
                # The next request on the same connection has begun.
                self._await_headers()

        def _await_headers(self) -> None:
            why = f"closed: no whole headers within {headers_s:.0f} s"
            self._timer = self.loop.call_later(headers_s, self._end, why)

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _end(self, why: str) -> None:
            if not self.transport.is_closing():
                say(f"{self.client[0] if self.client else 'a connection'} {why}")
                self.transport.abort()

    return Limited
