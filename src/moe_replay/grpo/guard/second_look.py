"""The second look at samples that do not look right: scored once more live, and once replayed with every live id kept.

Wrong routes raise the engine gap under replay alone, drift raises both; and routes that are right somewhere else are found
there. All ranks run the same microbatches, because experts are spread over ranks.

In: findings of the guard. Out: a SecondLook for each, the same on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from moe_replay.batch import Microbatch, Sample
from moe_replay.grpo.batch import StepBatch
from moe_replay.grpo.metrics import MAX_LOG_RATIO
from moe_replay.grpo.run import Run
from moe_replay.megatron.overlap import WatchedRoutes
from moe_replay.megatron.scorer import RouteWatch, ScoredSample
from moe_replay.routing import Routing
from moe_replay.routing.guard import (
    Baseline,
    Finding,
    RouteRows,
    SecondLook,
    look_closer,
    with_rho,
)

_AT_ONCE = 4
"""Microbatches whose live ids are held together: 50 MB each for 131,072 rows, 48 layers and top-8."""


def look_again(
    run: Run,
    batch: StepBatch,
    findings: Sequence[Finding],
    baseline: Baseline,
    scored: Mapping[int, ScoredSample],
) -> dict[int, SecondLook]:
    """Return what a closer look at the samples of ``findings`` finds; every rank calls this with the same ones.

    ``scored`` are the samples of this replica, under replay.
    """
    by_number = {finding.sample: finding for finding in findings}
    mine = {
        sample_id: by_number[origin.number]
        for sample_id, origin in enumerate(batch.origins)
        if origin.number in by_number
    }
    found: list[tuple[int, SecondLook]] = []
    for part in _parts(run, batch.microbatches, mine):
        seen: list[tuple[Microbatch, WatchedRoutes]] = []
        run.actor.score(
            part,
            temperature=run.temperature,
            routing=Routing.REPLAY,
            watch=RouteWatch(observe=_kept_in(seen), keeps_live=True),
        )
        live = run.actor.score(part, temperature=run.temperature, routing=Routing.LIVE).samples
        if seen:
            looks = look_closer(
                _rows(batch, seen),
                [mine[s.sample_id] for m, _ in seen for s in m.samples if s.sample_id in mine],
                usual_information=baseline.record.information,
                effect=max(effect for effect, _ in baseline.effects[1:]),
            )
            found += looks.items()
        for sample in (s for m in part for s in m.samples if s.sample_id in mine):
            if sample.sampled_here and sample.completion_length:
                replayed_k3, live_k3 = mean_gap(sample, scored), mean_gap(sample, live)
                look = with_rho(SecondLook(), replayed_k3=replayed_k3, live_k3=live_k3)
                found.append((mine[sample.sample_id].sample, look))
    return _joined(entry for given in run.gather(found) for entry in given)


def rho_of_samples(
    run: Run, batch: StepBatch, scored: Mapping[int, ScoredSample]
) -> dict[int, float]:
    """Return ln(k3 under replay / k3 with live routing) of every sample with tokens, by number in the step; collective.

    One more pass over the step. ``scored`` are the samples of this replica, under replay.
    """
    live = run.actor.score(
        batch.microbatches, temperature=run.temperature, routing=Routing.LIVE
    ).samples
    mine: dict[int, float] = {}
    for sample in batch.samples:
        if sample.sampled_here and sample.completion_length:
            gaps = {"replayed_k3": mean_gap(sample, scored), "live_k3": mean_gap(sample, live)}
            rho = with_rho(SecondLook(), **gaps).rho
            if rho is not None:
                mine[batch.origins[sample.sample_id].number] = rho
    return {number: rho for part in run.gather(mine) for number, rho in part.items()}


def _kept_in(
    seen: list[tuple[Microbatch, WatchedRoutes]],
) -> Callable[[Microbatch, WatchedRoutes], None]:
    return lambda microbatch, watched: seen.append((microbatch, watched))


def _rows(batch: StepBatch, seen: Sequence[tuple[Microbatch, WatchedRoutes]]) -> RouteRows:
    """Return the rows of some microbatches as one, in the layers of this rank; samples have their numbers in the step."""
    layers = seen[0][1].counts.layers
    numbers = np.array([origin.number for origin in batch.origins], dtype=np.int64)
    parts = []
    for microbatch, watched in seen:
        routes, rows = microbatch.routes, microbatch.router_rows
        assert routes is not None and watched.live_ids is not None
        held = [routes.layers.index(layer) for layer in layers]
        # Padding rows are not valid, so whose number they get does not matter.
        sample = numbers[np.maximum(microbatch.sample_ids[rows], 0)]
        ids = routes.expert_ids[held].transpose(1, 0, 2)
        parts.append((ids, watched.live_ids, routes.valid, sample, microbatch.positions[rows]))
    ids, live_ids, valid, sample, position = (
        np.concatenate(each) for each in zip(*parts, strict=True)
    )
    return RouteRows(
        expert_ids=ids,
        live_ids=live_ids,
        valid=valid,
        sample=sample,
        position=position,
        layers=layers,
        num_experts=seen[0][1].counts.num_experts,
    )


def _joined(found: Iterable[tuple[int, SecondLook]]) -> dict[int, SecondLook]:
    """Join what ranks found of one sample: each saw some of its layers and rows, and one of them its gaps."""
    looks: dict[int, SecondLook] = {}
    for number, look in found:
        before = looks.get(number, SecondLook())
        best = look if look.nats > before.nats else before
        looks[number] = replace(
            best,
            cause=best.cause or before.cause or look.cause,
            rho=before.rho if look.rho is None else look.rho,
        )
    return looks


def mean_gap(sample: Sample, scored: Mapping[int, ScoredSample]) -> float:
    """Return the mean k3 of a sample's tokens, exp(x) - 1 - x of x = trainer's minus engine's log-probability."""
    found = scored[sample.sample_id].token_logprobs.astype(np.float64)
    x = found - sample.rollout_logprobs
    return float((np.expm1(np.minimum(x, MAX_LOG_RATIO)) - x).mean())


def _parts(
    run: Run, microbatches: Sequence[Microbatch], mine: Collection[int]
) -> Iterator[list[Microbatch]]:
    """Yield the microbatches that hold a suspect on some rank, a few at once; collective.

    An interleaved pipeline runs multiples of its stages, so others are run beside them. Example: 2 stages, suspects in
    microbatches 1, 4 and 6 of 8: 0, 1, 4 and 6.
    """
    held = {m.key for m in microbatches if any(s.sample_id in mine for s in m.samples)}
    wanted = sorted({key for keys in run.gather(held) for key in keys})
    size = run.recipe.megatron.round_up_microbatches(len(wanted))
    others = [m.key for m in microbatches if m.key not in wanted]
    chosen = set(wanted + others[: size - len(wanted)])
    given = [m for m in microbatches if m.key in chosen]
    at_once = run.recipe.megatron.round_up_microbatches(_AT_ONCE)
    for start in range(0, len(given), at_once):
        yield given[start : start + at_once]
