"""Whether the engine's log-probabilities are those of their tokens, before anything is learned.

A shift by one token looks like a large engine gap: routes agree, and the importance ratio starts
far above 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from moe_replay.errors import MisalignmentError
from moe_replay.grpo.run import Run
from moe_replay.grpo.types import SampleOrigin, StepBatch
from moe_replay.megatron.scorer import ScoredSample
from moe_replay.routing.guard.beside import PlaceCount, count_shifts, strongest

_ALPHA = 1e-9
"""False alarms a step, over all samples."""
_NAMED = 4
"""Samples that a message names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    """What was counted in one sample, by cause."""

    name: str
    counts: Mapping[str, PlaceCount]


def require_own_logprobs(
    run: Run, batch: StepBatch, scored: Mapping[int, ScoredSample], *, where: str
) -> None:
    """Stop where the engine's values fit the tokens beside theirs; collective.

    Judges all samples together, so that short ones count, and each alone: in one of 32 samples a
    shift shows from some 40 tokens on. Without a guard it warns.

    Raises:
        MisalignmentError: on every rank.
    """
    own = [
        _Sample(
            name=_name(batch.origins[sample.sample_id]),
            counts=count_shifts(sample.rollout_logprobs, scored[sample.sample_id].token_logprobs),
        )
        for sample in batch.samples
        if sample.reported_here and sample.completion_length > 1
    ]
    gathered = run.ranks.gather((_total(own), len(own)))
    threshold = math.log(2 * (sum(count for _, count in gathered) + 1) / _ALPHA)
    together = _Sample(name="all samples", counts=_summed([counts for counts, _ in gathered]))
    found = [text for each in own if (text := _finding(each, threshold))]
    misplaced = [text for part in run.ranks.gather(found[:_NAMED]) for text in part]
    everywhere = _finding(together, threshold)
    if everywhere is None and not misplaced:
        return
    listed = "\n  ".join([everywhere] if everywhere else misplaced[:_NAMED])
    text = (
        f"step {run.step}, {where}: rollout_logprobs are not those of their tokens, expected the engine's "
        f"log-probability of each sampled token.\n  {listed}\nRoutes are not at fault. Fix where log-probabilities are "
        "cut out of the engine's answer; importance ratios, corrections and the engine gap of this step would be those "
        "of other tokens"
    )
    if run.guard is not None:
        raise MisalignmentError(text)
    run.journal.warn_once("shifted log-probabilities", text)


def _name(origin: SampleOrigin) -> str:
    server = f", {origin.server}" if origin.server else ""
    return f"sample {origin.index} (prompt {origin.item}{server})"


def _total(samples: list[_Sample]) -> dict[str, PlaceCount]:
    return _summed([sample.counts for sample in samples])


def _summed(counts: list[Mapping[str, PlaceCount]]) -> dict[str, PlaceCount]:
    """Add up counts by cause; a rank may have none."""
    held = [each for each in counts if each]
    return {cause: PlaceCount.total(each[cause] for each in held) for cause in (held or [{}])[0]}


def _finding(sample: _Sample, threshold: float) -> str | None:
    """Say what is wrong with a sample; None where nothing is."""
    cause = strongest(sample.counts, threshold)
    if cause is None:
        return None
    count = sample.counts[cause]
    return (
        f"{sample.name}: {cause} ({count.nearer} of {count.num_telling} tokens that tell the places apart, "
        f"{count.nats:.0f} nats of {threshold:.0f})"
    )
