"""Whether log-probabilities belong to their tokens, or to the tokens beside them.

Whatever numerics and drift do, the trainer's value of a token fits the engine's value of the same
token at least as often as that of its neighbour. So a sign test needs no assumption about them, and
routes do not matter: the engine's distribution has drawn the tokens, and its ratio to any other one
is 1 on average. Shifted values have no such bound: one token that the engine drew with a
probability of 1e-4 beside one that is certain is a ratio of 10,000.

In: the engine's and the trainer's log-probabilities, sample by sample. Out: counts that add up over
samples and ranks, and the cause that they name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from moe_replay.routing.guard.statistics import shortfall_nats

LATE = "token shift +1 of log-probabilities: the engine's fit the token before better; they came one token late"
"""Cause where token t holds the log-probability of token t - 1."""
EARLY = "token shift -1 of log-probabilities: the engine's fit the next token better; they came one token early"
"""Cause where token t holds the log-probability of token t + 1."""
_TELLING = 0.05
"""Nats by which a token must differ at one of two places to say anything."""
_BETTER = 0.5
"""Share of the difference that may be left at the right place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceCount:
    """How the engine's values of some tokens fit the trainer's at their own and another place."""

    nearer: int = 0
    """Tokens that fit the other place better."""
    farther: int = 0
    """Tokens that fit their own place better."""
    own: float = 0.0
    """Sum of differences at the own place, in nats."""
    other: float = 0.0
    """Sum of differences at the other place, in nats."""

    @classmethod
    def of(cls, own: Float[np.ndarray, " some"], other: Float[np.ndarray, " some"]) -> PlaceCount:
        """Count differences of engine and trainer at the own and at another place."""
        own, other = np.abs(own), np.abs(other)
        telling = np.abs(own - other) > _TELLING
        nearer = int((other < own)[telling].sum())
        return cls(
            nearer=nearer,
            farther=int(telling.sum()) - nearer,
            own=float(own.sum()),
            other=float(other.sum()),
        )

    @classmethod
    def total(cls, parts: Iterable[PlaceCount]) -> PlaceCount:
        """Add up counts."""
        held = list(parts)
        return cls(
            nearer=sum(part.nearer for part in held),
            farther=sum(part.farther for part in held),
            own=sum(part.own for part in held),
            other=sum(part.other for part in held),
        )

    @property
    def num_telling(self) -> int:
        """Tokens that say something."""
        return self.nearer + self.farther

    @property
    def nats(self) -> float:
        """Strength of the other place: minus the logarithm of the chance that it is luck."""
        return float(shortfall_nats(float(self.farther), float(self.num_telling), 0.5))

    @property
    def is_better(self) -> bool:
        """Whether the other place explains most of the differences."""
        return self.other < _BETTER * self.own


def count_shifts(
    rollout_logprobs: Float[np.ndarray, " sampled"], own_logprobs: Float[np.ndarray, " sampled"]
) -> dict[str, PlaceCount]:
    """Return cause -> count of one sample: the engine's values beside the trainer's neighbours.

    Example of a shift +1: where the trainer has ``a b c`` and the engine ``x a b``, its last two
    values fit the first two of the trainer.
    """
    theirs, ours = rollout_logprobs.astype(np.float64), own_logprobs.astype(np.float64)
    return {
        LATE: PlaceCount.of(theirs[1:] - ours[1:], theirs[1:] - ours[:-1]),
        EARLY: PlaceCount.of(theirs[:-1] - ours[:-1], theirs[:-1] - ours[1:]),
    }


def strongest(counts: Mapping[str, PlaceCount], threshold: float) -> str | None:
    """Return the cause of the most nats above ``threshold``; None without one."""
    found = [cause for cause, each in counts.items() if each.is_better and each.nats > threshold]
    return max(found, key=lambda cause: counts[cause].nats, default=None)
