"""Connections to one server, of which each call in flight has one: what a call costs does not grow with the others.

httpx2 keeps all connections in one pool, and looks at each of them whenever a call begins or ends, at idle ones by a system
call. With 64 calls in flight that was two thirds of what a call costs its client.

In: requests. Out: responses.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable

import httpx2


class Lanes(httpx2.AsyncBaseTransport):
    """Many transports of one connection each; one that is free again is used first by the next call.

    ``tls`` says which certificates are trusted; None trusts those that httpx2 does.
    A connection that its server has dropped is found by the call that would use it, which opens another.

    Example:
        >>> client = httpx2.AsyncClient(base_url="http://127.0.0.1:8000", transport=Lanes())
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        # One takes milliseconds to make, so all lanes share it.
        self._tls = httpx2.create_ssl_context(trust_env=False) if tls is None else tls
        self._free: list[httpx2.AsyncHTTPTransport] = []
        self._every: list[httpx2.AsyncHTTPTransport] = []

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request on a lane of its own, which is free again once the response is closed."""
        lane = self._free.pop() if self._free else self._opened()
        try:
            response = await lane.handle_async_request(request)
        except BaseException:
            self._free.append(lane)
            raise
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        response.stream = _Body(response.stream, lambda: self._free.append(lane))
        return response

    async def aclose(self) -> None:
        """Close all connections."""
        for lane in self._every:
            await lane.aclose()

    def _opened(self) -> httpx2.AsyncHTTPTransport:
        lane = httpx2.AsyncHTTPTransport(verify=self._tls, trust_env=False)
        self._every.append(lane)
        return lane


class _Body(httpx2.AsyncByteStream):
    """The body of a response, which frees its lane when it is closed."""

    def __init__(self, body: httpx2.AsyncByteStream, free: Callable[[], None]) -> None:
        self._body, self._free = body, free
        self._is_closed = False

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._body.__aiter__()

    async def aclose(self) -> None:
        """Close the body; the second time nothing happens."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            await self._body.aclose()
        finally:
            self._free()
