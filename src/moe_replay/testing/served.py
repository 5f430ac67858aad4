"""Rollout servers for tests of whatever talks to one, in this process and in processes that can be killed.

In: an engine, any ASGI application, or a checkpoint. Out: the URL of a server. Called by: tests, ours and users'.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from moe_replay.errors import EngineError
from moe_replay.rollout.types import Engine

_START_S = 30.0
# Importing vLLM alone takes half a minute on a busy machine.
_PROCESS_START_S = 180.0


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


class ServerProcess:
    """`moe-replay serve` in a process of its own, which can be killed, stopped, and started again at the same address.

    Example:
        >>> with ServerProcess("checkpoints/tiny", "--dtype", "float32") as server:
        ...     server.wait()
        ...     engine = ServerEngine([server.url], ...)
    """

    def __init__(self, model: str | Path, *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        command = [sys.executable, "-m", "moe_replay.cli.main", "serve", str(model)]
        self._command = [*command, "--port", str(self._port), *options]
        self._process = subprocess.Popen(self._command)

    @property
    def url(self) -> str:
        """Its address, now and after a restart."""
        return f"http://127.0.0.1:{self._port}"

    def wait(self) -> None:
        """Return when it answers.

        Raises:
            EngineError: when it ends instead, or takes longer than three minutes.
        """
        deadline = time.monotonic() + _PROCESS_START_S
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self._port)) == 0:
                    return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise EngineError(
                    f"{self._command} does not answer after {_PROCESS_START_S:.0f} s; exit code {self._process.poll()}"
                )
            _pause(self._process)

    def restart(self) -> None:
        """Kill it and start it anew, with the weights of its checkpoint; returns before it answers."""
        self._process.kill()
        self._process.wait()
        self._process = subprocess.Popen(self._command)

    def stall(self, seconds: float) -> None:
        """Keep it from doing anything for a while, its connections open."""
        self._process.send_signal(signal.SIGSTOP)
        threading.Timer(seconds, self._process.send_signal, [signal.SIGCONT]).start()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *raised: object) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def _pause(process: subprocess.Popen[bytes]) -> None:
    """Wait for half a second, less if the process ends."""
    try:
        process.wait(timeout=0.5)
    except subprocess.TimeoutExpired:
        return
