"""Connections to one server, one for each running call, whose cost does not grow with the others.

httpx2 keeps all connections in one pool and checks each of them whenever a call begins or ends,
idle ones by a system call: with 64 running calls that is half of a call's cost. So its connections
are used here, and its pool is not.
"""

from __future__ import annotations

import base64
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from urllib.parse import unquote_to_bytes

import httpcore2
import httpx2

_SCHEMES = ("http", "https")
# The first status code by which a server blames itself.
_SERVER_ERROR = 500
# Shorter than servers keep idle connections, or a call would use one that is being closed.
_KEEP_ALIVE_S = 5.0
_SLICE_BYTES = 1 << 20
Body = bytes | Sequence[memoryview]
"""A body, or its parts end to end, of which a slice at a time is copied while they are sent."""


class Lanes:
    """Connections to the server at ``url``; the one freed last is used first.

    ``headers`` go with every request, and so do credentials in the URL. ``tls`` says which
    certificates are trusted; None trusts those that httpx2 does. Proxy settings are ignored:
    rollout servers are local.

    Examples:
        >>> lanes = Lanes("http://127.0.0.1:8000", headers={})
        >>> async with lanes.stream("GET", "/status", b"", silence_s=5.0, connect_s=5.0) as answer:
        ...     pieces = [piece async for piece in answer.aiter_stream()]
    """

    def __init__(
        self, url: str, *, headers: Mapping[str, str], tls: ssl.SSLContext | None = None
    ) -> None:
        parsed = httpx2.URL(url)
        self._scheme = parsed.scheme
        self._origin = httpcore2.Origin(
            parsed.raw_scheme,
            parsed.raw_host,
            parsed.port or (443 if parsed.scheme == "https" else 80),
        )
        self._port, self._below = parsed.port, parsed.raw_path.rstrip(b"/")
        self._headers = [(name.encode(), value.encode()) for name, value in headers.items()]
        if parsed.userinfo:
            credentials = base64.b64encode(unquote_to_bytes(parsed.userinfo))
            self._headers = [pair for pair in self._headers if pair[0] != b"authorization"]
            self._headers.append((b"authorization", b"Basic " + credentials))
        # It takes milliseconds to make, so all connections share it.
        self._tls = httpx2.create_ssl_context(trust_env=False) if tls is None else tls
        self._free: list[httpcore2.AsyncHTTPConnection] = []

    @asynccontextmanager
    async def stream(
        self, method: str, path: str, body: Body, *, silence_s: float | None, connect_s: float
    ) -> AsyncIterator[httpcore2.Response]:
        """Send a request on its own connection and yield the response, to be read in the scope.

        Raises:
            httpcore2.TimeoutException, NetworkError, ProtocolError, UnsupportedProtocol: as their
            names say.
        """
        if self._scheme not in _SCHEMES:
            raise httpcore2.UnsupportedProtocol(
                f"the address begins with {self._scheme!r}, expected http or https"
            )
        lane, status = await self._taken(), 0
        try:
            async with lane.stream(
                method,
                httpcore2.URL(
                    scheme=self._origin.scheme,
                    host=self._origin.host,
                    port=self._port,
                    target=self._below + path.encode(),
                ),
                headers=self._headers + ([] if isinstance(body, bytes) else [_length_of(body)]),
                content=body if isinstance(body, bytes) else _slices(body),
                extensions={
                    "timeout": {"connect": connect_s, "read": silence_s, "write": silence_s}
                },
            ) as response:
                status = response.status
                yield response
        finally:
            # After an error of its own a server may close the connection behind the answer.
            if status >= _SERVER_ERROR:
                await lane.aclose()
            # One whose answer was not read to its end is closed, and so is one that never
            # connected.
            elif lane.is_available():
                self._free.append(lane)

    async def aclose(self) -> None:
        """Close the free connections; the others belong to their calls."""
        while self._free:
            await self._free.pop().aclose()

    async def _taken(self) -> httpcore2.AsyncHTTPConnection:
        """Return a free connection that its server has not closed, or a new one."""
        while self._free:
            lane = self._free.pop()
            if lane.is_available() and not lane.has_expired():
                return lane
            await lane.aclose()
        return httpcore2.AsyncHTTPConnection(
            self._origin, ssl_context=self._tls, keepalive_expiry=_KEEP_ALIVE_S
        )


def _length_of(body: Sequence[memoryview]) -> tuple[bytes, bytes]:
    return b"content-length", str(sum(part.nbytes for part in body)).encode()


async def _slices(body: Sequence[memoryview]) -> AsyncIterator[bytes]:
    for part in body:
        for start in range(0, part.nbytes, _SLICE_BYTES):
            yield bytes(part[start : start + _SLICE_BYTES])
