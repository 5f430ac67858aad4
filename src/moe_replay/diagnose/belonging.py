"""Whether log-probabilities belong to their tokens: shifted ones, and those of another temperature.

A gap of this kind looks like mismatch and is misalignment: routes agree, and replay changes
nothing. The importance ratio of a first update is far from 1, while the weights are equal.

In: the engine's and the trainer's log-probabilities of one sequence. Out: BelongingTests.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from moe_replay.diagnose.measured import Measured
from moe_replay.routing.guard.statistics import shortfall_nats

ALPHA = 1e-3
"""False alarms a diagnosis, over all sequences and causes."""
_TELLING = 0.05
"""Nats by which a token must differ at one of two places to say anything."""
_BETTER = 0.5
"""Share of the difference that may be left at the right place."""
LATE = "token shift +1 of log-probabilities: the engine's fit the token before better; they came one token late"
"""Cause where token t holds the log-probability of token t - 1."""
EARLY = "token shift -1 of log-probabilities: the engine's fit the next token better; they came one token early"
"""Cause where token t holds the log-probability of token t + 1."""
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
        self._counts: dict[str, dict[str, tuple[int, int, float, float]]] = {}

    def add(self, measured: Measured) -> None:
        """Count the tokens of one sequence; one without log-probabilities says nothing."""
        if measured.rollout_logprobs is not None and measured.live_logprobs is not None:
            self._counts[measured.name] = {
                cause: _count(own, other) for cause, own, other in _places(measured)
            }

    def misplaced(self) -> tuple[Misplaced, ...]:
        """Return what is misplaced: in all sequences together, or else sequence by sequence."""
        if not self._counts:
            return ()
        threshold = math.log(len(_CAUSES) * (len(self._counts) + 1) / ALPHA)
        together = {
            cause: _summed([each[cause] for each in self._counts.values() if cause in each])
            for cause in _CAUSES
        }
        everywhere = _strongest("", together, threshold)
        if everywhere is not None:
            return (everywhere,)
        found = (_strongest(name, each, threshold) for name, each in self._counts.items())
        return tuple(sorted((f for f in found if f is not None), key=lambda f: -f.nats))


def _places(
    measured: Measured,
) -> Iterator[tuple[str, Float64[np.ndarray, " some"], Float64[np.ndarray, " some"]]]:
    """Yield (cause, differences at the own place, at the other) of the tokens that have both.

    Example of a shift +1: the engine's 3 values ``b c d`` and the trainer's ``a b c`` compare
    ``c - b, d - c`` at their own places with ``c - ...``: entry 1 of the engine with entry 0 of the
    trainer.
    """
    assert measured.rollout_logprobs is not None and measured.live_logprobs is not None
    theirs = measured.rollout_logprobs.astype(np.float64)
    ours = measured.live_logprobs.astype(np.float64)
    yield LATE, theirs[1:] - ours[1:], theirs[1:] - ours[:-1]
    yield EARLY, theirs[:-1] - ours[:-1], theirs[:-1] - ours[1:]
    if measured.raw_logprobs is not None:
        yield RAW, theirs - ours, theirs - measured.raw_logprobs


def _count(
    own: Float64[np.ndarray, " some"], other: Float64[np.ndarray, " some"]
) -> tuple[int, int, float, float]:
    """Return tokens that fit the other place better and worse, and both sums of differences."""
    own, other = np.abs(own), np.abs(other)
    telling = np.abs(own - other) > _TELLING
    nearer = int((other < own)[telling].sum())
    return nearer, int(telling.sum()) - nearer, float(own.sum()), float(other.sum())


def _summed(counts: Sequence[tuple[int, int, float, float]]) -> tuple[int, int, float, float]:
    return (
        sum(each[0] for each in counts),
        sum(each[1] for each in counts),
        sum(each[2] for each in counts),
        sum(each[3] for each in counts),
    )


def _strongest(
    name: str, counts: dict[str, tuple[int, int, float, float]], threshold: float
) -> Misplaced | None:
    best = None
    for cause, (nearer, farther, own, other) in counts.items():
        nats = float(shortfall_nats(float(farther), float(nearer + farther), 0.5))
        if other < _BETTER * own and nats > threshold and (best is None or nats > best.nats):
            best = Misplaced(
                sequence=name,
                cause=cause,
                nats=nats,
                threshold=threshold,
                num_tokens=nearer + farther,
            )
    return best
