"""Runs a rollout server until a signal, and leaves no process behind.

In: a server, a socket. Out: a running web server, until a signal comes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import uvicorn
from starlette.types import ASGIApp

from moe_replay.engines.serve.access import limited
from moe_replay.engines.serve.app import EngineServer
from moe_replay.engines.serve.calls import LOG
from moe_replay.engines.serve.engine import ServedEngine
from moe_replay.errors import RecipeError

_HEADERS_S = 20.0
_MAX_CONNECTIONS = 4096
# Above the 5 s after which our own client drops a connection, so that no call meets one that is
# being closed.
_KEEP_ALIVE_S = 30
# After a signal: calls get their last frame, then the engine closes, then whatever is left is
# killed.
_ANSWERS_S, _END_S = 5, 40.0
_SAY_S = 15.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def web_server(
    application: ASGIApp,
    *,
    headers_s: float = _HEADERS_S,
    max_connections: int = _MAX_CONNECTIONS,
    log_level: str = "error",
    **options: Any,
) -> uvicorn.Server:
    """Return a web server with our limits that leaves signals alone; ``options`` are uvicorn's."""
    config = uvicorn.Config(
        application,
        log_level=log_level,
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_ANSWERS_S,
        **options,
    )
    config.load()
    config.http_protocol_class = limited(
        config.http_protocol_class,
        headers_s=headers_s,
        max_connections=max_connections,
        say=LOG.warning,
    )
    server = uvicorn.Server(config)
    server.capture_signals = nullcontext
    return server


def tls_options(
    certificate: Path | None, key: Path | None, authorities: Path | None
) -> dict[str, Any]:
    """Return uvicorn's options for TLS; ``authorities`` must have signed callers' certificates.

    Raises:
        RecipeError: when a file is missing, or a key comes without a certificate.
    """
    if certificate is None:
        if key or authorities:
            raise RecipeError(
                "--ssl-keyfile and --ssl-ca-certs need --ssl-certfile, the server's own certificate"
            )
        return {}
    for path in (certificate, key, authorities):
        if path is not None and not path.is_file():
            raise RecipeError(f"{path} is not a file; it is named for TLS")
    options: dict[str, Any] = {"ssl_certfile": certificate, "ssl_keyfile": key}
    if authorities is not None:
        import ssl

        options |= {"ssl_ca_certs": authorities, "ssl_cert_reqs": ssl.CERT_REQUIRED}
    return options


def run_until_signal(
    server: EngineServer,
    engine: ServedEngine,
    web: uvicorn.Server,
    listening: socket.socket,
    *,
    say: Callable[[str], None],
    what: str,
) -> str | None:
    """Serve until SIGTERM, SIGINT or SIGHUP; if the engine is lost before, return why.

    Whatever ends it, the engine is closed and no process of it stays. Calls are answered "still
    loading" until ``engine`` has started. ``what`` names what is served, and where.

    Raises:
        MoeReplayError: when the engine does not start.
    """
    with _stopped_by_signal(say) as stop, _said_while_loading(say, what) as is_loaded:
        return asyncio.run(_serve(server, engine, web, listening, stop, is_loaded, say, what))


async def _serve(
    server: EngineServer,
    engine: ServedEngine,
    web: uvicorn.Server,
    listening: socket.socket,
    stop: _Stop,
    is_loaded: threading.Event,
    say: Callable[[str], None],
    what: str,
) -> str | None:
    stopped = stop.begin()
    serving = asyncio.create_task(web.serve(sockets=[listening]))
    starting = asyncio.create_task(engine.start())
    losing: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    lost: str | None = None
    try:
        await asyncio.wait({serving, starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            is_loaded.set()
            starting.result()
            server.ready()
            say(f"serving {what}; {engine.capacity()}")
            losing = asyncio.create_task(engine.lost())
            await asyncio.wait({serving, stopped, losing}, return_when=asyncio.FIRST_COMPLETED)
            # A signal to all processes ends those of the engine, too.
            if losing.done() and not stopped.done():
                lost = losing.result()
                stop.limit("the engine was lost")
        if serving.done():
            serving.result()
        return lost
    finally:
        is_loaded.set()
        server.stop(lost or "the server is stopping")
        web.should_exit = True
        starting.cancel()
        losing.cancel()
        await asyncio.gather(serving, starting, losing, return_exceptions=True)
        await engine.close()


class _Stop:
    """A request to end, from a signal handler to an event loop, with a time limit."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Future[None] | None = None
        self._timer: threading.Timer | None = None
        self._is_asked = False

    def begin(self) -> asyncio.Future[None]:
        """Return what is done once the end was asked for; called in the event loop."""
        self._loop = asyncio.get_running_loop()
        self._ending = self._loop.create_future()
        if self._is_asked:
            self._ending.set_result(None)
        return self._ending

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: the first asks, the second kills."""
        if self._is_asked:
            _kill_all()
        self._is_asked = True
        self._say(f"{signal.Signals(number).name}: stopping; once more to kill at once")
        self.limit("the signal")
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._resolve)

    def limit(self, since: str) -> None:
        """Kill what is left some time after ``since``, which is now, unless `end` comes first."""
        self.end()
        self._timer = threading.Timer(_END_S, self._give_up, [since])
        self._timer.daemon = True
        self._timer.start()

    def _resolve(self) -> None:
        assert self._ending is not None
        if not self._ending.done():
            self._ending.set_result(None)

    def _give_up(self, since: str) -> None:
        self._say(f"still there {_END_S:.0f} s after {since}; killed")
        _kill_all()

    def end(self) -> None:
        """Kill nothing any more."""
        if self._timer is not None:
            self._timer.cancel()


@contextmanager
def _stopped_by_signal(say: Callable[[str], None]) -> Iterator[_Stop]:
    stop = _Stop(say)
    before = {number: signal.signal(number, stop.ask) for number in _SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        stop.end()


def _kill_all() -> None:
    """Kill every process that this one started, and this one."""
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(1)


@contextmanager
def _said_while_loading(say: Callable[[str], None], what: str) -> Iterator[threading.Event]:
    """Report regularly that the model is being loaded, from a thread as the loop may be busy."""
    is_loaded = threading.Event()

    def repeat() -> None:
        waited = 0.0
        while not is_loaded.wait(_SAY_S):
            waited += _SAY_S
            say(f"loading {what}: {waited:.0f} s")

    say(f"loading {what} ...")
    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield is_loaded
    finally:
        is_loaded.set()
        thread.join()


def log_to(say: Callable[[str], None]) -> None:
    """Let the server's log lines go where its other messages go."""

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(self.format(record))

    LOG.addHandler(Lines())
    LOG.propagate = False
