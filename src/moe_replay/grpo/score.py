"""The stations that score samples before the update: old and reference log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from moe_replay.batch import Sample
from moe_replay.errors import DivergedError
from moe_replay.grpo.guard.judging import judge_engine_routes
from moe_replay.grpo.guard.watch import PassWatch
from moe_replay.grpo.metrics import Tally, engine_gap
from moe_replay.grpo.run import Run
from moe_replay.grpo.types import Judged, OldScores, StepBatch
from moe_replay.megatron.scorer import ScoredSample
from moe_replay.routing import Routing


def score_old(run: Run, batch: StepBatch) -> OldScores:
    """Score the samples with the weights to be trained, recording (R2) or replaying (R3) routes.

    What the guard finds in replayed routes keeps its sample out of training, or stops the run.

    Raises:
        MisalignmentError: on every rank, when routes are not those of their tokens.
    """
    routing = run.mode.passes.old
    watch = PassWatch(batch.origins) if routing is Routing.REPLAY else None
    scores = run.actor.score(
        batch.microbatches,
        temperature=run.temperature,
        routing=routing,
        watch=watch.route_watch if watch is not None else None,
    )
    _require_finite(run, batch.samples, scores.samples, "old_logprobs")
    judged = Judged()
    if watch is not None:
        judged = judge_engine_routes(run, batch, watch, scores.samples)
        batch = batch.without(judged.dropped_here(batch))
    metrics = dict(judged.metrics)
    if run.live_gap_is_due:
        live = scores
        if routing is Routing.REPLAY:
            live = run.actor.score(
                batch.microbatches, temperature=run.temperature, routing=Routing.LIVE
            )
        own = [sample for sample in batch.samples if sample.sampled_here]
        gap = engine_gap(
            [live.samples[sample.sample_id].token_logprobs for sample in own],
            [sample.rollout_logprobs for sample in own],
            prefix="live_gap",
        )
        metrics |= Tally.merge(run.ranks.gather(gap)).finish()
    if routing is Routing.RECORD:
        batch = batch.with_routes(scores.routes)
    return OldScores(batch=batch, scored=scores.samples, metrics=metrics, judged=judged)


def score_reference(run: Run, batch: StepBatch) -> Mapping[int, ScoredSample] | None:
    """Score the samples with the reference model; None when the loss has no KL term."""
    if run.reference is None:
        return None
    replays = run.recipe.replay.reference_routes == "replay"
    scored = run.reference.score(
        batch.microbatches,
        temperature=run.temperature,
        routing=run.mode.passes.reference if replays else Routing.LIVE,
    ).samples
    _require_finite(run, batch.samples, scored, "ref_logprobs")
    return scored


def _require_finite(
    run: Run, samples: Sequence[Sample], scored: Mapping[int, ScoredSample], what: str
) -> None:
    """Raise `DivergedError` on every rank when a value of some token is not finite; collective."""
    broken = []
    for sample in samples:
        values = scored[sample.sample_id]
        finite = np.isfinite(values.token_logprobs) & np.isfinite(values.entropies)
        if sample.sampled_here and not finite.all():
            first = int(np.flatnonzero(~finite)[0])
            broken.append(
                f"sample {sample.sample_id} of replica {run.replica.number}: {int((~finite).sum())} "
                f"of {len(finite)} sampled tokens, the first at {first} (token id "
                f"{sample.token_ids[sample.prompt_length + first]})"
            )
    gathered = [text for part in run.ranks.gather(broken[:3]) for text in part]
    if gathered:
        listed = "\n  ".join(gathered[:8])
        raise DivergedError(
            f"step {run.step}: {what} or entropies are not finite, expected a finite value for every "
            f"sampled token; no weight was changed and nothing was pushed.\n  {listed}\nLikely causes: "
            "weights that hold NaN or infinity (look at grad_norm of the steps before), or a token "
            "that the engine sampled and the trainer's model rules out. Resume from an earlier "
            "checkpoint with a lower optimizer.lr"
        )
