"""Rollout servers in this process, for tests of whatever talks to one.

In: an engine, or any ASGI application. Out: the URL of a server that serves it. Called by: tests, ours and users'.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from moe_replay.errors import EngineError
from moe_replay.rollout.types import Engine

_START_S = 30.0


@contextmanager
def served(
    engine: Engine,
    *,
    concurrent: bool = False,
    token: str | None = None,
    around: Callable[[Any], Any] = lambda application: application,
    **limits: int,
) -> Iterator[str]:
    """Serve ``engine`` on a free port of this machine while the scope is open, and yield the URL.

    ``around`` wraps the ASGI application, for instance in one that injects faults.
    """
    from moe_replay.rollout.server import EngineServer

    application = EngineServer(engine, concurrent=concurrent, token=token, **limits).application()
    with listening(around(application)) as url:
        yield url


@contextmanager
def listening(application: Any) -> Iterator[str]:
    """Serve an ASGI application on a free port of this machine while the scope is open, and yield the URL."""
    import uvicorn

    config = uvicorn.Config(application, host="127.0.0.1", port=0, log_level="critical", ws="none")
    is_listening = threading.Event()

    class Announcing(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets=sockets)
            is_listening.set()

    server = Announcing(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        if not is_listening.wait(_START_S):
            raise EngineError(f"no server was listening after {_START_S:.0f} s")
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join()
