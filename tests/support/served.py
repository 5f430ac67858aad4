"""Rollout servers that tests talk to, in this process and in processes that can be killed.

In: an engine, any ASGI application, or a checkpoint. Out: the URL of a server.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import httpx2

from moe_replay.engines.types import Engine
from moe_replay.errors import EngineError

if TYPE_CHECKING:
    from moe_replay.checkpoint.facts import ModelFacts
    from moe_replay.engines.serve.engine import ServedEngine

# Limits on a machine that does a dozen other things: only what hangs meets them.
_START_S = 300.0
_PROCESS_START_S = 600.0
_SERVE = (sys.executable, "-m", "moe_replay.cli.main", "serve")


@contextmanager
def served(
    engine: Engine | ServedEngine,
    *,
    facts: ModelFacts | None = None,
    token: str | None = None,
    around: Callable[[Any], Any] = lambda application: application,
    web: Mapping[str, Any] | None = None,
    **limits: Any,
) -> Iterator[str]:
    """Serve ``engine`` on a free port of this machine while the scope is open, and yield the URL.

    ``around`` wraps the ASGI application, for instance in one that injects faults. ``limits`` are
    those of `EngineServer`, ``web`` those of `web_server`. An `Engine` samples one request at a
    time, and stays open.
    """
    from moe_replay.engines.serve.app import EngineServer
    from moe_replay.engines.serve.engine import ServedEngine, ThreadedEngine
    from moe_replay.engines.servers.push_files import OwnFolder

    with OwnFolder(Path(tempfile.gettempdir()), "moe-replay-served-") as folder:
        limits.setdefault("push_folder", folder.path)
        if not isinstance(engine, ServedEngine):
            made = engine
            engine = ThreadedEngine(lambda: made)
            asyncio.run(engine.start())
        server = EngineServer(engine, facts=facts, token=token, **limits)
        server.ready()
        with listening(around(server.application()), at_end=server.stop, **(web or {})) as url:
            yield url


@contextmanager
def listening(
    application: Any, *, at_end: Callable[[], None] = lambda: None, **web: Any
) -> Iterator[str]:
    """Serve an ASGI application on a free port while the scope is open, and yield the URL.

    ``at_end`` is called in the server's event loop when the scope is left, before the server ends.
    """
    from moe_replay.engines.serve.run import web_server
    from moe_replay.engines.serve.socket import bind

    socket_ = bind("127.0.0.1", 0)
    port = socket_.getsockname()[1]
    server = web_server(application, log_level="critical", **web)
    loop = asyncio.new_event_loop()

    async def end() -> None:
        at_end()
        # One turn, in which calls that were ended answer; whatever hangs on purpose is not waited
        # for.
        await asyncio.sleep(0)
        server.should_exit = server.force_exit = True

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(server.serve(sockets=[socket_]))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(end(), loop).result(_START_S)
        thread.join()


class ServerProcess:
    """`moe-replay serve` in a process that can be killed and started again at its address.

    ``program`` is another command that serves a model: it is called with the model, ``--port`` and
    the options, in ``environment`` (default: that of this process). What it writes goes to the file
    ``log`` (default: where this process writes). When the scope ends, whatever the command started
    ends too.

    Example:
        >>> with ServerProcess("checkpoints/tiny", "--dtype", "float32") as server:
        ...     server.wait()
        ...     engine = ServerEngine([server.url], ...)
    """

    def __init__(
        self,
        model: str | Path,
        *options: str,
        program: Sequence[str] = _SERVE,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._command = [*program, str(model), "--port", str(self._port), *options]
        self._environment, self._log = environment, log
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with nullcontext() if self._log is None else self._log.open("ab") as output:
            # A group of its own, so that its workers can be ended with it.
            return subprocess.Popen(
                self._command,
                env=self._environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    @property
    def url(self) -> str:
        """Its address, now and after a restart."""
        return f"http://127.0.0.1:{self._port}"

    def wait(self) -> None:
        """Return when it answers.

        Raises:
            EngineError: when it ends instead, or takes longer than ten minutes.
        """
        deadline = time.monotonic() + _PROCESS_START_S
        while True:
            if self._answers():
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise EngineError(
                    f"{self._command} does not answer after {_PROCESS_START_S:.0f} s; exit code {self._process.poll()}"
                )
            _pause(self._process)

    def _answers(self) -> bool:
        """Tell whether it answers calls: `moe-replay serve` says "still loading" before it does."""
        try:
            answer = httpx2.get(f"{self.url}/status", timeout=_PROCESS_START_S, trust_env=False)
        except httpx2.TransportError:
            return False
        return answer.status_code != httpx2.codes.SERVICE_UNAVAILABLE

    def restart(self) -> None:
        """Kill it and start it again from its checkpoint; return before it answers."""
        self._kill()
        self._process = self._start()

    @property
    def pid(self) -> int:
        """Number of the process, now and until a restart."""
        return self._process.pid

    def stop(self) -> int:
        """Ask it to end, as a scheduler does (SIGTERM), and return its exit code."""
        self._process.send_signal(signal.SIGTERM)
        return self.ended()

    def kill(self) -> None:
        """Kill it (SIGKILL) but not the processes it started; calling it twice is allowed."""
        self._process.kill()
        self._process.wait()

    def ended(self) -> int:
        """Return its exit code, once it has ended by itself."""
        return self._process.wait(_PROCESS_START_S)

    def stall(self, seconds: float) -> None:
        """Keep it from doing anything for a while, its connections open."""
        self._process.send_signal(signal.SIGSTOP)
        threading.Timer(seconds, self._process.send_signal, [signal.SIGCONT]).start()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *raised: object) -> None:
        """End the process and what it started."""
        self._kill()


def _pause(process: subprocess.Popen[bytes]) -> None:
    """Wait for half a second, less if the process ends."""
    try:
        process.wait(timeout=0.5)
    except subprocess.TimeoutExpired:
        return
