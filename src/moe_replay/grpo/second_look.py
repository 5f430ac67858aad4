"""The second look at suspects: their microbatches are scored once more live, and once replayed with every live id kept.

Wrong routes raise the engine gap under replay alone, drift raises both. All ranks run the same microbatches, because
experts are spread over ranks.

In: samples that look wrong. Out: a SecondLook for each, the same on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from moe_replay.batch import Microbatch, Sample
from moe_replay.grpo.batching import StepBatch
from moe_replay.grpo.run import Run
from moe_replay.megatron.scorer import Routing, ScoredSample
from moe_replay.routing.guard import SecondLook

_AT_ONCE = 4
"""Microbatches whose live ids are held together: 50 MB each for 131,072 rows, 48 layers and top-8."""


def look_again(
    run: Run, batch: StepBatch, suspects: Collection[int], scored: Mapping[int, ScoredSample]
) -> dict[int, SecondLook]:
    """Return what is found of ``suspects`` (numbers in the step); every rank calls this with the same ones.

    ``scored`` are the samples of this replica, under replay.
    """
    numbers = {origin.number: sample_id for sample_id, origin in enumerate(batch.origins)}
    mine = {numbers[number]: number for number in suspects if number in numbers}
    found: dict[int, SecondLook] = {}
    for part in _parts(run, batch.microbatches, mine):
        live = run.actor.score(part, temperature=run.temperature, routing=Routing.LIVE)
        for sample in (s for m in part for s in m.samples if s.sample_id in mine):
            if sample.sampled_here and sample.completion_length:
                ratio = mean_gap(sample, scored) / mean_gap(sample, live.samples)
                found[mine[sample.sample_id]] = SecondLook(rho=math.log(ratio))
    return {number: look for part in run.gather(found) for number, look in part.items()}


def mean_gap(sample: Sample, scored: Mapping[int, ScoredSample]) -> float:
    """Return the mean k3 of a sample's tokens, exp(x) - 1 - x of x = trainer's minus engine's log-probability; above 0."""
    found = scored[sample.sample_id].token_logprobs.astype(np.float64)
    x = found - sample.rollout_logprobs
    return float((np.expm1(np.minimum(x, _MAX_LOG_RATIO)) - x).mean()) + _LEAST_GAP


_MAX_LOG_RATIO = 20.0
_LEAST_GAP = 1e-12
"""Added to a gap, so that numerics that are equal to the last bit have a logarithm."""


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
