"""The stations that learn: old and reference log-probabilities, and the update, under the routes of the replay mode.

In: samples. Out: OldScores, Update, changed weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moe_replay.batch import Sample
from moe_replay.errors import DivergedError
from moe_replay.grpo.batch import (
    MiniBatch,
    StepBatch,
    recorded_coverage,
    with_routes,
    without,
)
from moe_replay.grpo.guard.judging import Judged, judge_engine_routes, judge_own_packing
from moe_replay.grpo.guard.watch import PassWatch
from moe_replay.grpo.metrics import Tally, engine_gap, step_tally, update_tally
from moe_replay.grpo.minibatch_loss import MinibatchLoss
from moe_replay.grpo.run import Run
from moe_replay.megatron.scorer import ScoredSample
from moe_replay.routing import Routing


@dataclass(frozen=True, slots=True, kw_only=True)
class OldScores:
    """What the trainer thinks of the samples before it learns from them."""

    batch: StepBatch
    """With the routes that the update replays: the engine's (R3) or those of this pass (R2)."""
    scored: Mapping[int, ScoredSample]
    """Sample id -> old log-probabilities and entropies."""
    metrics: Mapping[str, float]
    """Agreement of the replayed pass (R3), and the live gap when it was measured."""
    judged: Judged
    """What the guard found in the engine's routes (R3)."""

    @property
    def samples(self) -> tuple[Sample, ...]:
        """The samples of this replica."""
        return self.batch.samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What the optimizer steps of a step did."""

    metrics: Mapping[str, float]
    """``loss``, ``clip_ratio/*``, ``grad_norm``... over all ranks."""
    details: Mapping[str, Any]
    """What belongs to a metric and is not a number."""


def score_old(run: Run, batch: StepBatch) -> OldScores:
    """Score the samples with the weights that will learn from them, recording (R2) or replaying (R3) routes.

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
        batch = without(batch, judged.dropped_here(batch))
    metrics = dict(judged.metrics)
    if run.live_gap_is_due:
        live = scores
        if routing is Routing.REPLAY:
            live = run.actor.score(
                batch.microbatches, temperature=run.temperature, routing=Routing.LIVE
            )
        own = [sample for sample in batch.samples if sample.sampled_here]
        metrics |= run.merge(gap_of(own, live.samples, prefix="live_gap"))
    if routing is Routing.RECORD:
        batch = replace(with_routes(batch, scores.routes), coverage=recorded_coverage(run, batch))
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


def update_policy(run: Run, old: OldScores, reference: Mapping[int, ScoredSample] | None) -> Update:
    """Take the step's optimizer steps, one for each mini-batch in which something trains.

    Raises:
        DivergedError: on every rank, before the optimizer moves, when a gradient is not finite.
        UpdateError: likewise, when it is 0 where it cannot be, or gradients are switched off.
    """
    reports: list[_UpdateReport] = []
    for number, minibatch in enumerate(old.batch.minibatches):
        is_first = all(report.grad_norm is None for report in reports)
        reports.append(_update_once(run, old, reference, minibatch, number, is_first=is_first))
    judged = next((report.judged for report in reports if report.grad_norm is not None), Judged())
    tally = step_tally([report.tally for report in reports])
    metrics = tally.finish() | _update_metrics(reports) | dict(judged.metrics)
    return Update(metrics=metrics, details=judged.details)


def gap_of(
    samples: Sequence[Sample],
    scored: Mapping[int, ScoredSample],
    *,
    prefix: str = "rollout_correction",
) -> Tally:
    """Tally the gap between the engine's and the trainer's probabilities of the sampled tokens."""
    return engine_gap(
        [scored[sample.sample_id].token_logprobs for sample in samples],
        [sample.rollout_logprobs for sample in samples],
        prefix=prefix,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _UpdateReport:
    """What one mini-batch did."""

    tally: Tally
    """Its loss over all ranks."""
    grad_norm: float | None
    """None when the optimizer did not step."""
    learning_rate: float
    """Of the step, or of the one that was skipped."""
    judged: Judged
    """What was found in the routes of its pass; nothing when it was not the first, or nothing is replayed."""


def _update_once(
    run: Run,
    old: OldScores,
    reference: Mapping[int, ScoredSample] | None,
    minibatch: MiniBatch,
    number: int,
    *,
    is_first: bool,
) -> _UpdateReport:
    """Take one optimizer step; a mini-batch in which nothing trains takes none, or momentum would move the weights."""
    loss = MinibatchLoss(run, old.scored, reference, minibatch.samples)
    learning_rate = run.actor.learning_rate
    if loss.is_idle:
        run.actor.skip()
        tally = Tally()
        tally.add_sum("loss", 0.0)
        return _UpdateReport(
            tally=tally, grad_norm=None, learning_rate=learning_rate, judged=Judged()
        )
    passes = run.mode.passes
    # Later mini-batches drift away from their routes on purpose; the first shows whether the update packs them right. Without
    # a guard it is the only pass that tells the agreement of R2; that of R3 is known by now.
    watches = (
        passes.update is Routing.REPLAY
        and is_first
        and (run.guard is not None or passes.old is not Routing.REPLAY)
    )
    watch = PassWatch(old.batch.origins) if watches else None
    name = f"update {number + 1} of {run.recipe.batch.steps_per_generation}"
    gradient = run.actor.backward(
        minibatch.microbatches,
        loss,
        temperature=run.temperature,
        routing=passes.update,
        watch=watch.route_watch if watch is not None else None,
        where=f"step {run.step}, {name}",
    )
    judged = Judged()
    if watch is not None:
        judged = judge_own_packing(run, old.batch, watch, name, before=old.judged)
    loss.require_pull(run, gradient.norm, where=f"step {run.step}, {name}")
    statistics = loss.statistics if run.replica.computes_loss else []
    part = update_tally(statistics, with_kl=reference is not None)
    if gradient.balancing_loss is not None:
        part.add_sum("load_balancing_loss", gradient.balancing_loss)
    tally = Tally.merge(Tally.from_plain(other) for other in run.gather(part.to_plain()))
    run.actor.step()
    return _UpdateReport(
        tally=tally,
        grad_norm=gradient.norm,
        learning_rate=learning_rate,
        judged=judged,
    )


def _update_metrics(reports: Sequence[_UpdateReport]) -> dict[str, float]:
    """Return gradient norms and learning rates of a step: together, and of each update where there are several."""
    norms = [report.grad_norm for report in reports if report.grad_norm is not None]
    metrics = {
        # The gradient of a mini-batch in which nothing trains is 0.
        "grad_norm": sum(norms) / len(norms) if norms else 0.0,
        "learning_rate": reports[-1].learning_rate,
        "update/num_skipped": float(len(reports) - len(norms)),
    }
    if len(reports) > 1:
        metrics["grad_norm/max"] = max(norms, default=0.0)
        for number, report in enumerate(reports, start=1):
            metrics[f"learning_rate/update_{number}"] = report.learning_rate
            if report.grad_norm is not None:
                metrics[f"grad_norm/update_{number}"] = report.grad_norm
    return metrics


def _require_finite(
    run: Run, samples: Sequence[Sample], scored: Mapping[int, ScoredSample], what: str
) -> None:
    """Raise `DivergedError` on every rank when a forward pass found no finite number for some token; collective."""
    broken = []
    for sample in samples:
        values = scored[sample.sample_id]
        finite = np.isfinite(values.token_logprobs) & np.isfinite(values.entropies)
        if sample.sampled_here and not finite.all():
            first = int(np.flatnonzero(~finite)[0])
            broken.append(
                f"sample {sample.sample_id} of replica {run.replica.number}: {int((~finite).sum())} of {len(finite)} "
                f"sampled tokens, the first at {first} (token id {sample.token_ids[sample.prompt_length + first]})"
            )
    gathered = [text for part in run.gather([broken[:3], len(broken)]) for text in part[0]]
    if gathered:
        places = "\n  ".join(gathered[:8])
        raise DivergedError(
            f"step {run.step}: {what} or entropies are not finite, expected a number for every sampled token; no weight was "
            f"changed and nothing was pushed.\n  {places}\nLikely causes: weights that hold NaN or infinity (look at "
            "grad_norm of the steps before), or a token that the engine sampled and the trainer's model rules out. Resume "
            "from an earlier checkpoint with a lower optimizer.lr"
        )
