"""Journal: the warnings and seconds that stations collect until the step's record takes them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Journal:
    """What this process has to say of the step in flight."""

    def __init__(self) -> None:
        self.push_metrics: dict[str, float] = {"sync/bytes": 0.0}
        """What is measured of the last push."""
        self._seconds: dict[str, float] = {}
        self._warnings: list[str] = []
        self._kinds_said: set[str] = set()
        self._noticed: frozenset[str] = frozenset()

    @contextmanager
    def timed(self, station: str) -> Iterator[None]:
        """Count the seconds of what is inside to a station."""
        started = time.perf_counter()
        try:
            yield
        finally:
            passed = time.perf_counter() - started
            self._seconds[station] = self._seconds.get(station, 0.0) + passed

    def warn(self, text: str) -> None:
        """Keep what a person should know of this step; a repeated text is shown once."""
        if text not in self._warnings:
            self._warnings.append(text)

    def warn_once(self, kind: str, text: str) -> None:
        """Keep ``text`` unless this process has given a warning of its kind before."""
        if kind not in self._kinds_said:
            self._kinds_said.add(kind)
            self.warn(text)

    def warn_of_changes(self, notices: Mapping[str, str]) -> None:
        """Keep those of a step's ``notices`` (kind -> text) that the step before did not have."""
        for kind, text in notices.items():
            if kind not in self._noticed:
                self.warn(text)
        self._noticed = frozenset(notices)

    def take_warnings(self) -> tuple[str, ...]:
        """Return the warnings since the last call."""
        warnings, self._warnings = tuple(self._warnings), []
        return warnings

    def take_seconds(self) -> dict[str, float]:
        """Return seconds by station since the last call; after a record they count to the next."""
        seconds, self._seconds = self._seconds, {}
        return seconds
