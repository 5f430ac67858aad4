"""Opens the port of a rollout server before heavy imports, to report a port in use at once."""

from __future__ import annotations

import socket

from moe_replay.errors import RecipeError

# A caller that has vanished without a word is noticed after this, in ms: its progress frames are
# not acknowledged.
_UNACKNOWLEDGED_MS = 60_000


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address; calls wait in it until a server answers them.

    Raises:
        RecipeError: when the address is taken, or is not one of this machine.
    """
    try:
        kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(kind, socket.SOCK_STREAM)
    except OSError as error:
        raise RecipeError(f"--host {host} is not an address of this machine: {error}") from error
    try:
        # A port whose last owner has just ended may be taken again; one whose owner lives may not.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNACKNOWLEDGED_MS)
        bound.bind(address)
        bound.listen(1024)
    except OSError as error:
        bound.close()
        raise RecipeError(
            f"{host}:{port} cannot be listened on: {error.strerror or error}; end what listens there, or "
            "choose another --port"
        ) from error
    return bound
