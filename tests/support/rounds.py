"""Rounds in which every server takes part, however fast each of them is.

In: an engine of several servers. Out: the same engine, whose rounds wait for all of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from moe_replay.engines.servers.engine import ServerEngine
from moe_replay.engines.types import Request, RolloutGroup, SamplingParams

# For what hangs.
_LIMIT_S = 600.0


class _Meeting:
    """Calls that wait until every server of the round has one to make."""

    def __init__(self) -> None:
        self._absent: set[str] = set()
        self._turn = threading.Condition()

    def expect(self, urls: set[str]) -> None:
        with self._turn:
            self._absent = urls
            self._turn.notify_all()

    def arrive(self, url: str) -> None:
        with self._turn:
            self._absent.discard(url)
            self._turn.notify_all()
            assert self._turn.wait_for(lambda: not self._absent, timeout=_LIMIT_S), self._absent


def asking_all(engine: ServerEngine) -> ServerEngine:
    """Let no server of ``engine`` be called in a round before each of them has something to do.

    The servers that the last push did not reach are not asked. A round needs more requests than all
    servers but one take at once, or the last of them would find none left.

    Example:
        >>> engine = asking_all(ServerEngine([first, second], calls_per_server=1, ...))
        >>> engine.generate(two_or_more_requests, sampling)
    """
    meeting, servers, generate = _Meeting(), engine._servers, engine.generate

    def complete_of(server: Any) -> Callable[..., None]:
        complete = server.complete

        def complete_together(*arguments: Any, **options: Any) -> None:
            meeting.arrive(server.url)
            complete(*arguments, **options)

        return complete_together

    def generate_with_all(
        requests: Sequence[Request], sampling: SamplingParams
    ) -> list[RolloutGroup]:
        urls = {server.url for server in servers}
        urls &= urls if engine._holders is None else engine._holders
        assert len(requests) > (len(urls) - 1) * engine._calls_per_server, "one would find none"
        meeting.expect(urls)
        try:
            return generate(requests, sampling)
        finally:
            meeting.expect(set())

    for server in servers:
        server.complete = complete_of(server)  # type: ignore[method-assign]
    engine.generate = generate_with_all  # type: ignore[method-assign]
    return engine
