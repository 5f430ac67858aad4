"""The answer to a long call: frames of progress while it runs, so that neither side waits for one that is gone.

In: work. Out: an ASGI answer of frames.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from moe_replay.engines.serve.access import FAILED, UNAVAILABLE, status_of, text_of
from moe_replay.engines.serve.frames import PROGRESS, RESULT, error_frame, frame
from moe_replay.engines.serve.messages import CONTENT_TYPE, Progress
from moe_replay.errors import MoeReplayError

LOG = logging.getLogger("moe_replay.serve")
"""One line for each thing that a caller does wrong; tracebacks for our own faults only."""


class FrameAnswer:
    """Answers a call with frames: progress every ``pause_s``, then the result of ``work``, or its error.

    When the caller leaves, ``work`` is cancelled. When ``work`` is cancelled by someone else, the server is stopping, and
    ``ending`` returns why.
    """

    def __init__(
        self,
        work: Callable[[], Coroutine[Any, Any, bytes]],
        *,
        progress: Callable[[], Progress],
        ending: Callable[[], str],
        pause_s: float,
    ) -> None:
        self._work, self._progress, self._pause_s = work, progress, pause_s
        self._ending = ending

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one call."""
        headers = [(b"content-type", CONTENT_TYPE.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        job, left = asyncio.create_task(self._work()), asyncio.create_task(_departure(receive))
        try:
            while not await _first_done(job, left, limit_s=self._pause_s):
                report = frame(PROGRESS, self._progress().model_dump_json().encode())
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


async def _departure(receive: Any) -> None:
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


def _name(scope: Any) -> str:
    client = scope.get("client")
    return f"{client[0]}:{client[1]}" if client else "a client"
