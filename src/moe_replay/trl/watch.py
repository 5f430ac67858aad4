"""What the passes over some samples saw: replayed beside live routes, coverage and engine gaps.

In: batches as they are scored. Out: rows for the guard, and metrics over all processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from moe_replay.routing import Coverage
from moe_replay.routing.guard import OverlapCounts, RouteRows, StepTable, count_overlaps, summarise
from moe_replay.trl.samples import PlacedRoutes

_MAX_LOG_RATIO = 20.0
"""Bound of a token's gap in nats, as in `rollout_correction/*` of our own trainer."""
Gather = Callable[[Any], list[Any]]
"""Return what each process gave, in their order; every process must call it."""


def k3(log_ratio: np.ndarray) -> np.ndarray:
    """Return exp(x) - 1 - x of each token; x is bounded above by 20 in the exponential.

    Source: J. Schulman, "Approximating KL divergence".
    """
    wide = log_ratio.astype(np.float64)
    return np.expm1(np.minimum(wide, _MAX_LOG_RATIO)) - wide


class PassWatch:
    """Collects what a pass over some samples sees on this process."""

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self._parts: list[tuple[PlacedRoutes, np.ndarray]] = []
        self._gaps: dict[int, np.ndarray] = {}

    def add_routes(self, routes: PlacedRoutes, live_ids: np.ndarray) -> None:
        """Take a batch that was replayed, and what its routers would choose live."""
        self._parts.append((routes, live_ids))

    def add_gaps(self, gaps: Mapping[int, np.ndarray]) -> None:
        """Take trainer's minus rollout's log-probabilities, by number of the sample."""
        self._gaps.update(gaps)

    def coverage(self, gather: Gather) -> Coverage:
        """Return what was replayed on all processes; collective."""
        return Coverage.total(gather(Coverage.total(part.coverage for part, _ in self._parts)))

    def mean_gaps(self) -> dict[int, float]:
        """Return the mean k3 of each sample on this process, where it is finite."""
        means = {number: float(k3(gap).mean()) for number, gap in self._gaps.items() if len(gap)}
        return {number: mean for number, mean in means.items() if np.isfinite(mean)}

    def rows(self) -> RouteRows | None:
        """Return the replayed rows of this process; None without any."""
        if not self._parts:
            return None
        held = [(routes, live, routes.valid) for routes, live in self._parts]
        expert_ids, live_ids, sample, position = (
            np.concatenate(each)
            for each in zip(
                *(
                    (r.expert_ids[valid], live[valid], r.sample[valid], r.position[valid])
                    for r, live, valid in held
                ),
                strict=True,
            )
        )
        return RouteRows(
            expert_ids=expert_ids,
            live_ids=live_ids,
            valid=np.ones(len(sample), dtype=bool),
            sample=sample,
            position=position,
            layers=held[0][0].layers,
            num_experts=self._num_experts,
        )

    def gap_metric(self, gather: Gather, name: str) -> dict[str, float]:
        """Return the mean k3 over the tokens of all processes as ``name``; collective."""
        values = [k3(gap) for gap in self._gaps.values()]
        mine = (sum(float(v.sum()) for v in values), sum(len(v) for v in values))
        total, count = (sum(each) for each in zip(*gather(mine), strict=True))
        return {name: total / count} if count else {}

    def metrics(self, gather: Gather) -> dict[str, float]:
        """Return agreement and coverage over all processes; collective."""
        rows = self.rows()
        coverage = self.coverage(gather)
        parts = gather(None if rows is None else summarise([counts_of(rows)]))
        if not any(part is not None for part in parts):
            return {}
        table = StepTable.of(parts)
        pairs = sum(int(part.num_rows.sum()) * len(part.layers) for part in table.parts)
        return {
            "replay/coverage": coverage.fraction,
            "replay/agreement": float(table.own.sum() / table.slots.sum()),
            "replay/agreement_min_sample": float(table.agreement.min()),
            "replay/agreement_min_layer": float(table.layer_agreement.min()),
            "replay/flip_frac": float(sum(part.flips.sum() for part in table.parts) / pairs),
        }


def counts_of(rows: RouteRows) -> OverlapCounts:
    """Return the slots that routes share, here and elsewhere."""
    return count_overlaps(
        rows.expert_ids,
        rows.live_ids,
        valid=rows.valid,
        sample=rows.sample,
        position=rows.position,
        layers=rows.layers,
        num_experts=rows.num_experts,
    )
