"""Who may call a rollout server, and which status code an error has.

In: the headers of a call, errors. Out: refusals.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Collection, Mapping

from moe_replay.engines.serve.messages import CONTENT_TYPE
from moe_replay.errors import CodecError, DivergedError, MoeReplayError, RecipeError

BAD_REQUEST, UNAUTHORIZED, TOO_SLOW, STALE, DAMAGED = 400, 401, 408, 409, 412
TOO_LARGE, WRONG_TYPE, UNPROCESSABLE = 413, 415, 422
FAILED, UNAVAILABLE, NO_SPACE = 500, 503, 507
"""Status codes: a call with `FAILED` or above, `TOO_SLOW` or `DAMAGED` may be made again as it was."""


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
    """Return what the caller is told of an error; an engine's own errors are named by their class."""
    is_answer = status_of(error) != FAILED or isinstance(error, RefusedError)
    return str(error) if is_answer else f"{type(error).__name__}: {error}"


class Access:
    """The rules for callers: the token where one is set, a host name of this server, our content type.

    A web page that a browser of this machine shows can call servers on loopback. It cannot send our content type to another
    origin unasked, and where it makes a name of its own point to this machine (DNS rebinding) the ``Host`` header shows
    that name. So names must be known: ``localhost``, this machine's own, ``allowed_hosts``. Addresses need none.
    """

    def __init__(self, *, token: str | None, allowed_hosts: Collection[str] = ()) -> None:
        self._token = token
        own = {"localhost", socket.gethostname()}
        self._hosts = {name.lower() for name in own | set(allowed_hosts)}

    def check(self, method: str, headers: Mapping[str, str]) -> None:
        """Raise `RefusedError` unless a call with these headers may be answered.

        Example:
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
            f"this server is not called {name or 'nothing'}, the Host header of the call; call it by its address, or "
            f"start it with --allowed-host {name or 'NAME'}",
        )


def _without_port(host: str) -> str:
    """Return the name or address in a Host header.

    Example:
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
