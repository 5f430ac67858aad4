"""What one optimizer step of TRL learns from: its batches, in rounds that hold a sample once.

With ``num_iterations`` above 1 a step may take the same samples several times. Each round is logged
and judged by itself, so that routes which a later round loses are not hidden by an earlier one.

In: the samples of each batch. Out: the round that takes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from moe_replay.trl.passes import Batch
from moe_replay.trl.samples import RoutedSample
from moe_replay.trl.watch import PassWatch

Scored = list[tuple[list[RoutedSample], Batch]]
"""Samples, and the batch that holds them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Batches of which none holds a sample of another."""

    watch: PassWatch
    """Takes what their passes show."""
    scored: Scored = field(default_factory=list)
    """The batches."""
    held: set[int] = field(default_factory=set)
    """Numbers of their samples."""


class Window:
    """The rounds of one optimizer step on this process.

    Every process splits its batches at the same places, so all have as many rounds.
    """

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self.rounds: list[Round] = []

    def take(self, samples: Sequence[RoutedSample], batch: Batch) -> Round:
        """Return the first round that holds none of the samples, with the batch added."""
        numbers = {sample.number for sample in samples}
        for one in self.rounds:
            if one.held.isdisjoint(numbers):
                break
        else:
            one = Round(watch=PassWatch(self._num_experts))
            self.rounds.append(one)
        one.scored.append((list(samples), batch))
        one.held.update(numbers)
        return one
