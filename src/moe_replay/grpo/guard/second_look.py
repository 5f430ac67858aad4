"""The second look at samples that do not look right: scored again live, and again under replay.

Wrong routes raise the engine gap under replay alone, drift raises both; and routes that are right
somewhere else are found there. All ranks run the same microbatches, because experts may span ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moe_replay.batch import Microbatch, Sample
from moe_replay.grpo.metrics import MAX_LOG_RATIO
from moe_replay.grpo.run import Run
from moe_replay.grpo.types import StepBatch
from moe_replay.megatron.replay.overlap import WatchedRoutes
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
"""Microbatches whose live ids are held together: 50 MB each for 131,072 rows, 48 layers, top-8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondLooks:
    """Looks again at samples of a step; every method is collective over all ranks."""

    run: Run
    """With the policy before the update."""
    batch: StepBatch
    """What the step learns from."""
    scored: Mapping[int, ScoredSample]
    """What the pass under replay found of the samples of this replica."""

    def at(self, findings: Sequence[Finding], baseline: Baseline) -> dict[int, SecondLook]:
        """Return what a closer look finds; every rank passes the same ``findings``."""
        by_index = {finding.sample: finding for finding in findings}
        mine = {
            sample_id: by_index[origin.index]
            for sample_id, origin in enumerate(self.batch.origins)
            if origin.index in by_index
        }
        found: list[tuple[int, SecondLook]] = []
        for part in self._parts(mine):
            seen: list[tuple[Microbatch, WatchedRoutes]] = []

            def keep(microbatch: Microbatch, watched: WatchedRoutes, seen: list = seen) -> None:
                seen.append((microbatch, watched))

            self._score(part, Routing.REPLAY, RouteWatch(observe=keep, keeps_live=True))
            live = self._score(part, Routing.LIVE)
            if seen:
                looks = look_closer(
                    _rows(self.batch, seen),
                    [mine[s.sample_id] for m, _ in seen for s in m.samples if s.sample_id in mine],
                    usual_information=baseline.record.information,
                    effect=max(effect for effect, _ in baseline.effects[1:]),
                )
                found += looks.items()
            samples = [s for m in part for s in m.samples if s.sample_id in mine]
            for sample, look in self._gaps(samples, live):
                found.append((mine[sample.sample_id].sample, look))
        return _joined(entry for given in self.run.ranks.gather(found) for entry in given)

    def rho_of_samples(self) -> dict[int, float]:
        """Return ln(k3 under replay / k3 live) of every sample with tokens, by index in the step.

        Costs one more pass over the step.
        """
        live = self._score(self.batch.microbatches, Routing.LIVE)
        mine = {
            self.batch.origins[sample.sample_id].index: look.rho
            for sample, look in self._gaps(self.batch.samples, live)
            if look.rho is not None
        }
        return {index: rho for part in self.run.ranks.gather(mine) for index, rho in part.items()}

    def _score(
        self, microbatches: Sequence[Microbatch], routing: Routing, watch: RouteWatch | None = None
    ) -> Mapping[int, ScoredSample]:
        temperature = self.run.temperature
        return self.run.actor.score(
            microbatches, temperature=temperature, routing=routing, watch=watch
        ).samples

    def _gaps(
        self, samples: Sequence[Sample], live: Mapping[int, ScoredSample]
    ) -> Iterator[tuple[Sample, SecondLook]]:
        """Yield the samples with tokens that this rank reports, and their rho."""
        for sample in samples:
            if sample.reported_here and sample.completion_length:
                yield (
                    sample,
                    with_rho(
                        SecondLook(),
                        replayed_k3=mean_gap(sample, self.scored),
                        live_k3=mean_gap(sample, live),
                    ),
                )

    def _parts(self, mine: Collection[int]) -> Iterator[list[Microbatch]]:
        """Yield the microbatches that hold a suspect on some rank, a few at once.

        An interleaved pipeline runs multiples of its stages, so others are run beside them.
        Example: 2 stages, suspects in microbatches 1, 4 and 6 of 8: 0, 1, 4 and 6.
        """
        microbatches, round_up = (
            self.batch.microbatches,
            self.run.recipe.megatron.round_up_microbatches,
        )
        held = {m.key for m in microbatches if any(s.sample_id in mine for s in m.samples)}
        wanted = sorted({key for keys in self.run.ranks.gather(held) for key in keys})
        others = [m.key for m in microbatches if m.key not in wanted]
        chosen = set(wanted + others[: round_up(len(wanted)) - len(wanted)])
        given = [m for m in microbatches if m.key in chosen]
        at_once = round_up(_AT_ONCE)
        for start in range(0, len(given), at_once):
            yield given[start : start + at_once]


def mean_gap(sample: Sample, scored: Mapping[int, ScoredSample]) -> float:
    """Return the mean k3, exp(x) - 1 - x, of a sample; x = trainer's minus engine's logprob."""
    found = scored[sample.sample_id].token_logprobs.astype(np.float64)
    x = found - sample.rollout_logprobs
    return float((np.expm1(np.minimum(x, MAX_LOG_RATIO)) - x).mean())


def _rows(batch: StepBatch, seen: Sequence[tuple[Microbatch, WatchedRoutes]]) -> RouteRows:
    """Join the rows of microbatches, in this rank's layers, under their samples' step indices."""
    layers = seen[0][1].counts.layers
    indices = np.array([origin.index for origin in batch.origins], dtype=np.int64)
    parts = []
    for microbatch, watched in seen:
        routes, rows = microbatch.routes, microbatch.router_rows
        assert routes is not None and watched.live_ids is not None
        held = [routes.layers.index(layer) for layer in layers]
        # Padding rows are not valid, so it does not matter whose index they get.
        sample = indices[np.maximum(microbatch.sample_ids[rows], 0)]
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
    """Join what ranks found of a sample: each saw some layers and rows of it, one its gaps."""
    looks: dict[int, SecondLook] = {}
    for index, look in found:
        before = looks.get(index, SecondLook())
        best = look if look.nats > before.nats else before
        looks[index] = replace(
            best,
            cause=best.cause or before.cause or look.cause,
            rho=before.rho if look.rho is None else look.rho,
        )
    return looks
