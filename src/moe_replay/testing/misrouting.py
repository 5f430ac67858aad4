"""Engines that return something else than was sampled, for the guard to find."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Integer

from moe_replay.engines.types import Completion, Engine, Request, RolloutGroup, SamplingParams

Ids = Integer[np.ndarray, "rows layers topk"]
Plant = Callable[[Ids, Sequence[Ids]], Ids]
"""``(routes of a completion, routes of the other completions of the call) -> wrong routes``."""


def one_row_late(ids: Ids, others: Sequence[Ids]) -> Ids:
    """Give every row the route of the row before it; the first keeps its own."""
    return np.concatenate([ids[:1], ids[:-1]])


def of_another(ids: Ids, others: Sequence[Ids]) -> Ids:
    """Return the routes of another completion; its last row is repeated where it is shorter."""
    other = others[len(others) // 2]
    return other[np.minimum(np.arange(len(ids)), len(other) - 1)]


def one_layer_late(layer: int) -> Plant:
    """Return a plant that shifts one layer by a row; ``layer`` counts MoE layers from 0."""

    def plant(ids: Ids, others: Sequence[Ids]) -> Ids:
        found = ids.copy()
        found[1:, layer] = ids[:-1, layer]
        return found

    return plant


class ChangedEngine:
    """An engine whose completions are changed before anyone sees them.

    Examples:
        >>> engine = ChangedEngine(engine, lambda groups: groups[::-1])
    """

    def __init__(
        self, inner: Engine, change: Callable[[list[RolloutGroup]], list[RolloutGroup]]
    ) -> None:
        self._inner, self._change = inner, change

    # Weights, progress and counts of faults are those of the inner engine.
    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[RolloutGroup]:
        """Sample as the inner engine does, and change what it returned."""
        return self._change(self._inner.generate(requests, sampling))


def each_chosen(
    groups: Sequence[RolloutGroup],
    chosen: Callable[[RolloutGroup, int], bool],
    change: Callable[[RolloutGroup, int], Completion],
) -> list[RolloutGroup]:
    """Return the groups with ``change(group, index)`` in place of each chosen completion."""
    return [
        replace(
            group,
            completions=tuple(
                change(group, number) if chosen(group, number) else completion
                for number, completion in enumerate(group.completions)
            ),
        )
        for group in groups
    ]


class MisroutingEngine(ChangedEngine):
    """An engine whose routes are wrong for the completions that ``chosen`` picks.

    Tokens and digests stay right. `planted` lists (policy version, request id, index of the
    completion) of those that were changed.

    Examples:
        >>> third = lambda group, index: group.request.request_id == 3
        >>> engine = MisroutingEngine(engine, one_row_late, third)
    """

    def __init__(
        self, inner: Engine, plant: Plant, chosen: Callable[[RolloutGroup, int], bool]
    ) -> None:
        super().__init__(inner, self._misrouted)
        self._plant, self._chosen = plant, chosen
        self.planted: list[tuple[int, int, int]] = []

    def _misrouted(self, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        return each_chosen(
            groups, self._chosen, lambda group, number: self._changed(groups, group, number)
        )

    def _changed(
        self, groups: Sequence[RolloutGroup], group: RolloutGroup, number: int
    ) -> Completion:
        completion = group.completions[number]
        trace = completion.trace
        assert trace is not None, "the engine returned no routes to change"
        everyone = [c for each in groups for c in each.completions if c is not completion]
        others = [c.trace.expert_ids[c.trace.valid] for c in everyone if c.trace is not None]
        ids = trace.expert_ids.copy()
        ids[trace.valid] = self._plant(ids[trace.valid], others)
        self.planted.append((completion.policy_version, group.request.request_id, number))
        return replace(completion, trace=replace(trace, expert_ids=ids))
