"""A long call of a rollout server: its turn beside pushes, its progress, and its answer in frames.

In: work. Out: an ASGI answer of progress frames and a result, so that neither side waits in vain.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Literal

from starlette.types import Receive, Scope, Send

from moe_replay.engines.serve.access import (
    FAILED,
    UNAVAILABLE,
    RefusedError,
    status_of,
    text_of,
)
from moe_replay.engines.serve.frames import CONTENT_TYPE, PROGRESS, RESULT, error_frame, frame
from moe_replay.engines.serve.messages import Progress
from moe_replay.errors import MoeReplayError

LOG = logging.getLogger("moe_replay.serve")
"""One line for each mistake of a caller; tracebacks for our own faults only."""


class FrameAnswer:
    """Answers a call with frames: progress every ``pause_s``, then the result or error of ``work``.

    When the caller leaves, ``work`` is cancelled. When anything else cancels ``work``, the server
    is stopping, and ``ending`` returns why.
    """

    def __init__(
        self,
        work: Callable[[], Coroutine[Any, Any, bytes]],
        *,
        tally: Tally,
        ending: Callable[[], str],
        pause_s: float,
    ) -> None:
        self._work, self._tally, self._pause_s = work, tally, pause_s
        self._ending = ending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one call."""
        headers = [(b"content-type", CONTENT_TYPE.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        job, left = asyncio.create_task(self._work()), asyncio.create_task(_departure(receive))
        try:
            while not await _first_done(job, left, limit_s=self._pause_s):
                report = frame(PROGRESS, self._tally.progress().model_dump_json().encode())
                await send({"type": "http.response.body", "body": report, "more_body": True})
            if job.done():
                await send({"type": "http.response.body", "body": _last_frame(job, self._ending)})
            else:
                LOG.warning("%s left during %s", _name(scope), scope["path"])
        finally:
            for task in (job, left):
                task.cancel()
            await asyncio.gather(job, left, return_exceptions=True)


async def _first_done(*tasks: asyncio.Task[Any], limit_s: float) -> bool:
    done, _ = await asyncio.wait(tasks, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
    return bool(done)


async def _departure(receive: Receive) -> None:
    """Return when the caller has left."""
    while (await receive())["type"] != "http.disconnect":
        continue


def _last_frame(job: asyncio.Task[bytes], ending: Callable[[], str]) -> bytes:
    if job.cancelled():
        return error_frame(UNAVAILABLE, ending())
    error = job.exception()
    if error is None:
        try:
            return frame(RESULT, job.result())
        except MoeReplayError as too_long:
            return error_frame(status_of(too_long), str(too_long))
    if isinstance(error, MoeReplayError):
        return error_frame(status_of(error), text_of(error))
    LOG.error("a call failed", exc_info=error)
    return error_frame(FAILED, text_of(error))


def _name(scope: Scope) -> str:
    client = scope.get("client")
    return f"{client[0]}:{client[1]}" if client else "a client"


class Turns:
    """Many calls sample at once, or one push loads: never both."""

    def __init__(self, drain_s: float) -> None:
        self._drain_s = drain_s
        self._num_running = self._num_crossing = 0
        self._is_idle, self._is_open = asyncio.Event(), asyncio.Event()
        self._is_idle.set(), self._is_open.set()
        self._pushing = asyncio.Lock()

    @property
    def is_closed(self) -> bool:
        """Whether a push waits or loads."""
        return not self._is_open.is_set()

    @property
    def num_crossing(self) -> int:
        """Calls that sample and may cross a push."""
        return self._num_crossing

    async def opened(self) -> None:
        """Wait while a push waits or loads."""
        while self.is_closed:
            await self._is_open.wait()

    @asynccontextmanager
    async def crossing(self) -> AsyncIterator[None]:
        """Wait while a push waits or loads; the next one may interrupt what is inside the scope."""
        await self.opened()
        self._num_crossing += 1
        try:
            yield
        finally:
            self._num_crossing -= 1

    @asynccontextmanager
    async def sampling(self) -> AsyncIterator[None]:
        """Wait while a push waits or loads, and hold off the next one while the scope is open."""
        await self.opened()
        self._num_running += 1
        self._is_idle.clear()
        try:
            yield
        finally:
            self._num_running -= 1
            if not self._num_running:
                self._is_idle.set()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Let running calls end and hold off others while the scope is open.

        Raises:
            RefusedError: when some still run after the limit.
        """
        async with self._pushing:
            self._is_open.clear()
            try:
                try:
                    async with asyncio.timeout(self._drain_s):
                        await self._is_idle.wait()
                except TimeoutError:
                    raise RefusedError(
                        UNAVAILABLE,
                        f"{self._num_running} calls were still sampling {self._drain_s:.0f} s after a "
                        "push came, the limit; the weights before it stay",
                    ) from None
                yield
            finally:
                self._is_open.set()


class Tally:
    """The progress of a running call."""

    def __init__(
        self, doing: Literal["waiting", "sampling", "checking", "loading"] = "waiting"
    ) -> None:
        self.doing = doing
        self.num_finished = 0
        self._lengths: Counter[tuple[int, int]] = Counter()

    def grow(self, key: tuple[int, int], num_tokens: int) -> None:
        """Record the current length of a completion."""
        self._lengths[key] = num_tokens

    def progress(self) -> Progress:
        """Return it as a message."""
        return Progress(
            doing=self.doing, num_tokens=self._lengths.total(), num_finished=self.num_finished
        )
