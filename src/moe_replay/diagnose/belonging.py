"""Whether log-probabilities belong to their tokens: shifted ones, and those of another temperature.

A gap of this kind looks like mismatch and is misalignment: routes agree, and replay changes
nothing. The importance ratio of a first update is far from 1, while the weights are equal.

In: the engine's and the trainer's log-probabilities of one sequence. Out: BelongingTests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from moe_replay.diagnose.measured import Measured
from moe_replay.routing.guard.beside import EARLY, LATE, PlaceCount, count_shifts, strongest

ALPHA = 1e-3
"""False alarms a diagnosis, over all sequences and causes."""
RAW = "raw log-probabilities: the engine's are those of temperature 1, before the sampling temperature"
"""Cause where the temperature was left out."""
_CAUSES = (LATE, EARLY, RAW)


@dataclass(frozen=True, slots=True, kw_only=True)
class Misplaced:
    """Log-probabilities that fit elsewhere."""

    sequence: str
    """Name of the sequence; empty for all of them together."""
    cause: str
    """What is wrong, in words."""
    nats: float
    """Strength: minus the logarithm of the chance that this is luck."""
    threshold: float
    """Nats at which it suffices."""
    num_tokens: int
    """Tokens that say something."""

    def __str__(self) -> str:
        """Return one line."""
        who = f"sample {self.sequence}" if self.sequence else "all samples together"
        return f"{who}: {self.cause} ({self.nats:.0f} nats of {self.threshold:.0f}, {self.num_tokens} tokens)"


class BelongingTests:
    """Collects the sequences of a diagnosis, and says which log-probabilities are misplaced.

    For each token the difference of engine and trainer at its own place is compared with that at
    another place. Whatever numerics do, the own place fits at least as often, so a sign test needs
    no assumption about them.
    """

    def __init__(self) -> None:
        self._counts: dict[str, dict[str, PlaceCount]] = {}

    def add(self, measured: Measured) -> None:
        """Count the tokens of one sequence; one without log-probabilities says nothing."""
        if measured.rollout_logprobs is not None and measured.live_logprobs is not None:
            self._counts[measured.name] = _counted(measured)

    def misplaced(self) -> tuple[Misplaced, ...]:
        """Return what is misplaced: in all sequences together, or else sequence by sequence."""
        if not self._counts:
            return ()
        threshold = math.log(len(_CAUSES) * (len(self._counts) + 1) / ALPHA)
        together = {
            cause: PlaceCount.total(each[cause] for each in self._counts.values() if cause in each)
            for cause in _CAUSES
        }
        everywhere = _strongest("", together, threshold)
        if everywhere is not None:
            return (everywhere,)
        found = (_strongest(name, each, threshold) for name, each in self._counts.items())
        return tuple(sorted((f for f in found if f is not None), key=lambda f: -f.nats))


def _counted(measured: Measured) -> dict[str, PlaceCount]:
    """Return cause -> count of one sequence."""
    assert measured.rollout_logprobs is not None and measured.live_logprobs is not None
    counts = count_shifts(measured.rollout_logprobs, measured.live_logprobs)
    if measured.raw_logprobs is not None:
        theirs = measured.rollout_logprobs.astype(np.float64)
        own, raw = (x.astype(np.float64) for x in (measured.live_logprobs, measured.raw_logprobs))
        counts[RAW] = PlaceCount.of(theirs - own, theirs - raw)
    return counts


def _strongest(name: str, counts: dict[str, PlaceCount], threshold: float) -> Misplaced | None:
    cause = strongest(counts, threshold)
    if cause is None:
        return None
    return Misplaced(
        sequence=name,
        cause=cause,
        nats=counts[cause].nats,
        threshold=threshold,
        num_tokens=counts[cause].num_telling,
    )
