"""Turns of a rollout server: many calls sample at once, and a push loads alone.

In: calls. Out: scopes in which they may run, and what each has come to.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

from moe_replay.engines.serve.access import UNAVAILABLE, RefusedError
from moe_replay.engines.serve.messages import Progress


class Turns:
    """Completions that run, or a push that loads: never both."""

    def __init__(self, drain_s: float) -> None:
        self._drain_s = drain_s
        self._num_running = 0
        self._is_idle, self._is_open = asyncio.Event(), asyncio.Event()
        self._is_idle.set(), self._is_open.set()
        self._pushing = asyncio.Lock()

    @property
    def is_closed(self) -> bool:
        """Whether a push waits or loads."""
        return not self._is_open.is_set()

    @asynccontextmanager
    async def sampling(self) -> AsyncIterator[None]:
        """Wait while a push waits or loads, and keep the next one off while the scope is open."""
        while self.is_closed:
            await self._is_open.wait()
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
        """Let no call begin, wait until those that run have ended, and keep others off while the scope is open.

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
                        f"{self._num_running} calls were still sampling {self._drain_s:.0f} s after a push came, the limit; the "
                        "weights before it stay",
                    ) from None
                yield
            finally:
                self._is_open.set()


class Tally:
    """What a call has come to, while it runs."""

    def __init__(
        self, doing: Literal["waiting", "sampling", "checking", "loading"] = "waiting"
    ) -> None:
        self.doing = doing
        self.num_finished = 0
        self._lengths: Counter[tuple[int, int]] = Counter()

    def grow(self, key: tuple[int, int], num_tokens: int) -> None:
        """Note how long a completion is by now."""
        self._lengths[key] = num_tokens

    def progress(self) -> Progress:
        """Return it as a message."""
        return Progress(
            doing=self.doing, num_tokens=self._lengths.total(), num_finished=self.num_finished
        )
