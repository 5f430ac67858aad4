"""Signs that add up over steps, to find a server with a few wrong answers.

A cumulative sum (CUSUM) for each server: an answer that shows a sign adds ln(r1 / r0), one that
does not adds ln((1 - r1) / (1 - r0)) < 0, and the sum never falls below 0. r0 is five times the
rate of the other servers, but at least 1 in 1,000, so that drift, which hits all servers alike,
adds up on none; r1 is ten times r0. Example with r0 = 0.001: a sign adds 2.3, a clean answer takes
0.009. At 3 % wrong answers a sum grows by 0.06 an answer and passes ln(8 servers / 1e-4) = 11.3
after about 190.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_replay.routing.guard.verdict import Fault, Owner

if TYPE_CHECKING:
    from jaxtyping import Bool, Int64

_MIN_RATE = 1e-3
_MIN_WRONG = 1e-2
_TIMES = 5.0  # factor by which a server may exceed the others
_MAX_RATE = 0.3
_FORGET = 0.99  # factor on past answers, each step


class ServerSums:
    """Answers, signs and the sum of each server, of two or more, which are compared."""

    def __init__(self) -> None:
        self._of: dict[str, dict[str, float]] = {}

    def after(
        self,
        sample_ids: Int64[np.ndarray, " samples"],
        telling: Bool[np.ndarray, " samples"],
        owners: Mapping[int, Owner],
    ) -> ServerSums:
        """Return the sums after the samples of a step, in the order of their ids."""
        found = ServerSums.from_plain(self.to_plain())
        answers: dict[str, list[bool]] = {}
        for number, sign in zip(sample_ids, telling, strict=True):
            for server in owners.get(int(number), Owner()).servers:
                answers.setdefault(server, []).append(bool(sign))
        for entry in found._of.values():
            entry["answers"] *= _FORGET
            entry["signs"] *= _FORGET
        for server, signs in answers.items():
            entry = found._of.setdefault(server, {"answers": 0.0, "signs": 0.0, "sum": 0.0})
            entry["answers"] += len(signs)
            entry["signs"] += sum(signs)
        for server, signs in answers.items():
            found._add(server, signs)
        return found

    def _add(self, server: str, signs: list[bool]) -> None:
        others = [entry for name, entry in self._of.items() if name != server]
        answers = sum(entry["answers"] for entry in others)
        if not answers:
            return
        rate = sum(entry["signs"] for entry in others) / answers
        r0 = min(max(_MIN_RATE, _TIMES * rate), _MAX_RATE)
        r1 = min(max(_MIN_WRONG, 10 * r0), (1 + r0) / 2)
        up, down = math.log(r1 / r0), math.log((1 - r1) / (1 - r0))
        total = self._of[server]["sum"]
        for sign in signs:
            total = max(0.0, total + (up if sign else down))
        self._of[server]["sum"] = total

    def faults(self, alpha: float) -> Iterator[Fault]:
        """Yield servers whose sum exceeds its limit."""
        if not self._of:
            return
        limit = math.log(len(self._of) / alpha)
        for server, entry in sorted(self._of.items()):
            if entry["sum"] > limit:
                share = entry["signs"] / max(entry["answers"], 1)
                yield Fault(
                    kind="server",
                    name=server,
                    cause=f"{share:.1%} of its last {entry['answers']:.0f} answers look misaligned, far more than those of "
                    "the other servers",
                    nats=entry["sum"],
                    threshold=limit,
                )

    def to_plain(self) -> dict[str, dict[str, float]]:
        """Return the sums as plain JSON."""
        return {server: dict(entry) for server, entry in self._of.items()}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Mapping[str, Any]]) -> ServerSums:
        """Return the sums from `to_plain`."""
        found = cls()
        found._of = {
            str(server): {key: float(value) for key, value in entry.items()}
            for server, entry in plain.items()
        }
        return found
