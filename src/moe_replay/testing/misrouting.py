"""An engine that returns wrong routes with the right tokens, for the guard to find."""

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


class MisroutingEngine:
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
        self._inner, self._plant, self._chosen = inner, plant, chosen
        self.planted: list[tuple[int, int, int]] = []

    # Progress and counts of faults are those of the inner engine.
    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[RolloutGroup]:
        """Sample as the inner engine does, and change the routes of the chosen completions."""
        groups = self._inner.generate(requests, sampling)
        return [
            replace(
                group,
                completions=tuple(
                    self._changed(groups, group, number) if self._chosen(group, number) else c
                    for number, c in enumerate(group.completions)
                ),
            )
            for group in groups
        ]

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
