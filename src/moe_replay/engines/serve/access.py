"""Who may call a rollout server, what a caller may hold of it, and which status code an error has.

In: the headers of a call, connections, bodies, errors. Out: the same within the limits, or
refusals.
"""

from __future__ import annotations

import asyncio
import errno
import hmac
import ipaddress
import socket
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from starlette.requests import Request as HttpRequest

from moe_replay.engines.serve.frames import CONTENT_TYPE
from moe_replay.errors import CodecError, DivergedError, MoeReplayError, RecipeError

BAD_REQUEST, UNAUTHORIZED, TOO_SLOW, STALE, DAMAGED = 400, 401, 408, 409, 412
TOO_LARGE, WRONG_TYPE, UNPROCESSABLE = 413, 415, 422
FAILED, UNAVAILABLE, NO_SPACE = 500, 503, 507
"""Status codes: calls with `FAILED` or above, `TOO_SLOW` or `DAMAGED` may be repeated."""


class RefusedError(MoeReplayError):
    """A call that is answered with a status code of its own."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def status_of(error: BaseException) -> int:
    """Return the status code of an error: 4xx when the same call would fail again."""
    if isinstance(error, RefusedError):
        return error.status
    if isinstance(error, DivergedError):
        return UNPROCESSABLE
    if isinstance(error, CodecError | RecipeError):
        return BAD_REQUEST
    return FAILED


def text_of(error: BaseException) -> str:
    """Return the text of an error for the caller; errors of an engine get their class's name."""
    is_answer = status_of(error) != FAILED or isinstance(error, RefusedError)
    return str(error) if is_answer else f"{type(error).__name__}: {error}"


def no_room(error: OSError, path: Path) -> Exception:
    """Return the refusal of a push for which a disk is too full, or the error as it is."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return error
    return RefusedError(
        NO_SPACE,
        f"{path.parent} has no room for a push ({error.strerror}): make room, or start the server with "
        "--weights-dir (containers: a larger --shm-size)",
    )


class Access:
    """The rules for callers: the token if one is set, a host name of this server, our content type.

    A web page in a browser of this machine can call servers on loopback. It cannot send our content
    type to another origin unasked, and if it makes its own name point to this machine (DNS
    rebinding) the ``Host`` header has that name. So names must be known: ``localhost``, this
    machine's own, ``allowed_hosts``. Addresses need not be.
    """

    def __init__(self, *, token: str | None, allowed_hosts: Collection[str] = ()) -> None:
        self._token = token
        own = {"localhost", socket.gethostname()}
        self._hosts = {name.lower() for name in own | set(allowed_hosts)}

    def check(self, method: str, headers: Mapping[str, str]) -> None:
        """Raise `RefusedError` unless a call with these headers may be answered.

        Examples:
            >>> Access(token=None).check("GET", {"host": "attacker.example:8000"})
            RefusedError: this server is not called attacker.example ...
        """
        self._check_host(headers.get("host", ""))
        if self._token is not None:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            is_right = hmac.compare_digest(given.strip().encode(), self._token.encode())
            if scheme.lower() != "bearer" or not is_right:
                raise RefusedError(UNAUTHORIZED, "a bearer token is required")
        if method != "GET" and headers.get("content-type") != CONTENT_TYPE:
            raise RefusedError(WRONG_TYPE, f"content-type must be {CONTENT_TYPE}")

    def _check_host(self, host: str) -> None:
        name = _without_port(host).lower()
        if name in self._hosts or _is_address(name):
            return
        raise RefusedError(
            BAD_REQUEST,
            f"this server is not called {name or 'nothing'}, the Host header of the call; call it by "
            f"its address, or start it with --allowed-host {name or 'NAME'}",
        )


def _without_port(host: str) -> str:
    """Return the name or address in a Host header.

    Examples:
        >>> _without_port("[::1]:8000"), _without_port("node7:8000")
        ('::1', 'node7')
    """
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


# A body may be silent this long at its start, and each 64 KiB that arrive buy one second more: a
# body of 64 MiB at 100 KiB/s takes 660 s and passes, one of a byte a second ends after 30 s.
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
        """End all bodies that are being read, and all later ones."""
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
            # Only a task that ends by itself answers; one that the web server cancels stays
            # cancelled.
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
    """Return uvicorn's ``protocol`` with a time limit on headers and a maximum of connections.

    uvicorn limits only the pause between two requests: a connection that sends nothing, or half a
    header, stays open.
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
            why = f"closed: incomplete headers after {headers_s:.0f} s"
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
