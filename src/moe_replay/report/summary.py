"""What a run amounts to: the figures of the closing table, from its records.

In: step and evaluation records. Out: RunFigures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moe_replay.grpo.records import EvalRecord, StepRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricFigures:
    """How one metric went; steps that lack it are left out."""

    first: float
    """Mean of the first 10 % of the steps that have it, at least one."""
    last: float
    """Mean of the last 10 %."""
    mean: float
    """Over all steps."""
    minimum: float
    """Smallest value."""
    maximum: float
    """Largest value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveComparison:
    """The engine gap with replay and with live routing, over the steps that measured both."""

    num_steps: int
    """Steps that have both."""
    replay_k3: float
    """Mean k3 with replayed routes."""
    live_k3: float
    """Mean k3 of the same samples under the same weights with live routing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalChange:
    """Held-out reward before and after."""

    first_step: int
    """Step of the first evaluation."""
    first: float
    """Its ``eval/reward``."""
    last_step: int
    """Step of the last evaluation."""
    last: float
    """Its ``eval/reward``."""
    num_items: int | None
    """Prompts evaluated; None when the records do not say."""


def metric_figures(steps: Sequence[StepRecord], name: str) -> MetricFigures | None:
    """Return how a metric went, or None when no step has it."""
    values = [record.metrics[name] for record in steps if name in record.metrics]
    if not values:
        return None
    tenth = max(1, math.ceil(len(values) / 10))
    return MetricFigures(
        first=_mean(values[:tenth]),
        last=_mean(values[-tenth:]),
        mean=_mean(values),
        minimum=min(values),
        maximum=max(values),
    )


def live_comparison(steps: Sequence[StepRecord]) -> LiveComparison | None:
    """Compare the engine gap with and without replay; None when no step measured two different passes.

    Without replay, and with R2 (which scores live and replays in the update), the live gap is the gap itself.
    """
    both = [
        (record.metrics["rollout_correction/k3_kl"], record.metrics["live_gap/k3_kl"])
        for record in steps
        if {"rollout_correction/k3_kl", "live_gap/k3_kl"} <= record.metrics.keys()
    ]
    if all(replay == live for replay, live in both):
        return None
    return LiveComparison(
        num_steps=len(both),
        replay_k3=_mean([replay for replay, _ in both]),
        live_k3=_mean([live for _, live in both]),
    )


def eval_change(evaluations: Sequence[EvalRecord]) -> EvalChange | None:
    """Compare the first with the last evaluation; None when there was none."""
    known = [record for record in evaluations if "eval/reward" in record.metrics]
    if not known:
        return None
    first, last = known[0], known[-1]
    num_items = last.metrics.get("eval/num_items")
    return EvalChange(
        first_step=first.step,
        first=first.metrics["eval/reward"],
        last_step=last.step,
        last=last.metrics["eval/reward"],
        num_items=None if num_items is None else int(num_items),
    )


def seconds_per_step(steps: Sequence[StepRecord]) -> dict[str, float]:
    """Return station -> mean seconds a step, in the order in which stations first ran."""
    stations = list(dict.fromkeys(_stations(steps)))
    return {name: _mean([record.seconds.get(name, 0.0) for record in steps]) for name in stations}


def _stations(steps: Sequence[StepRecord]) -> Iterator[str]:
    for record in steps:
        yield from record.seconds


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
