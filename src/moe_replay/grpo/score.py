"""The stations that score samples before the update: old and reference log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from moe_replay.grpo.guard.old_scores import old_pass, require_finite
from moe_replay.grpo.metrics import Tally, engine_gap
from moe_replay.grpo.run import Run
from moe_replay.grpo.types import Judged, OldScores, StepBatch
from moe_replay.megatron.ranks.repacking import repack_routes
from moe_replay.megatron.scorer import ScoredSample
from moe_replay.routing import RouteSlice, Routing


def score_old(run: Run, batch: StepBatch) -> OldScores:
    """Score the samples with the weights to be trained, recording (R2) or replaying (R3) routes.

    Where the forward pass of the update gives the same values (`Recipe.why_old_pass`), that is left
    to it. What the guard finds in replayed routes keeps its sample out of training, or stops the
    run.

    Raises:
        DivergedError: on every rank, when a value is not finite.
        MisalignmentError: on every rank, when routes are not those of their tokens.
    """
    if run.recipe.why_old_pass is None:
        metrics = _live_gap(run, batch, None) if run.live_gap_is_due else {}
        return OldScores(batch=batch, scored={}, metrics=metrics, judged=Judged())
    old, scores = old_pass(run, batch)
    routing = run.mode.passes.old
    if run.live_gap_is_due:
        live = None if routing is Routing.REPLAY else scores.samples
        old = replace(old, metrics={**old.metrics, **_live_gap(run, batch, live)})
    if routing is Routing.RECORD:
        old = replace(old, batch=_with_recorded(run, old.batch, scores.routes))
    return old


def _with_recorded(run: Run, batch: StepBatch, recorded: Mapping[int, RouteSlice]) -> StepBatch:
    """Return the batch with the routes that a pass over `StepBatch.for_scoring` recorded."""
    if not batch.scoring:
        return batch.with_routes(recorded)
    routes = repack_routes(run.replica, recorded, batch.scoring, batch.microbatches)
    return batch.with_scoring_routes(recorded).with_routes(routes)


def score_reference(run: Run, batch: StepBatch) -> Mapping[int, ScoredSample] | None:
    """Score the samples with the reference model; None when the loss has no KL term."""
    if run.reference is None:
        return None
    replays = run.recipe.replay.reference_routes == "replay"
    scored = run.reference.score(
        batch.for_scoring,
        temperature=run.temperature,
        routing=run.mode.passes.reference if replays else Routing.LIVE,
    ).samples
    require_finite(run, batch.samples, scored, "ref_logprobs")
    return scored


def _live_gap(
    run: Run, batch: StepBatch, live: Mapping[int, ScoredSample] | None
) -> dict[str, float]:
    """Return the engine gap with ``live`` routing, by one more pass where that is None."""
    if live is None:
        live = run.actor.score(
            batch.for_scoring, temperature=run.temperature, routing=Routing.LIVE
        ).samples
    own = [sample for sample in batch.samples if sample.reported_here]
    gap = engine_gap(
        [live[sample.sample_id].token_logprobs for sample in own],
        [sample.rollout_logprobs for sample in own],
        prefix="live_gap",
    )
    return Tally.merge(run.ranks.gather(gap)).finish()
