"""The stations that learn: old and reference log-probabilities, and the update, under the routes of the replay mode.

In: samples. Out: OldScores, Update, changed weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int64, Integer

from moe_replay.batch import Microbatch, Sample
from moe_replay.errors import DivergedError, MisalignmentError
from moe_replay.grpo.batching import MiniBatch, StepBatch, recorded_coverage, with_routes
from moe_replay.grpo.collapse import collapse_warning
from moe_replay.grpo.metrics import Tally, engine_gap, step_tally, update_tally
from moe_replay.grpo.minibatch_loss import MinibatchLoss
from moe_replay.grpo.run import Run
from moe_replay.grpo.watch import AgreementWatch
from moe_replay.megatron.finite import typical_scale
from moe_replay.megatron.scorer import RouteWatch, Routing, ScoredSample
from moe_replay.routing import Guard, ReplayMode

# Typical root mean square of a matrix above which the weights are not those of a working model: pretrained ones have 0.01 to 0.1.
_RUINED_SCALE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class OldScores:
    """What the trainer thinks of the samples before it learns from them."""

    batch: StepBatch
    """With the routes that the update replays: the engine's (R3) or those of this pass (R2)."""
    scored: Mapping[int, ScoredSample]
    """Sample id -> old log-probabilities and entropies."""
    metrics: Mapping[str, float]
    """Agreement of the replayed pass (R3), and the live gap when it was measured."""

    @property
    def samples(self) -> tuple[Sample, ...]:
        """The samples of this replica."""
        return self.batch.samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What the optimizer steps of a step did."""

    metrics: Mapping[str, float]
    """``loss``, ``clip_ratio/*``, ``grad_norm``... over all ranks."""


def score_old(run: Run, batch: StepBatch) -> OldScores:
    """Score the samples with the weights that will learn from them, recording (R2) or replaying (R3) routes."""
    routing = {
        ReplayMode.DISABLED: Routing.LIVE,
        ReplayMode.R2: Routing.RECORD,
        ReplayMode.R3: Routing.REPLAY,
    }[run.mode]
    watch = _watch(run, run.guard, "old_logprobs")
    scores = run.actor.score(
        batch.microbatches,
        temperature=run.temperature,
        routing=routing,
        watch=_route_watch(run, watch),
    )
    _require_finite(run, batch.samples, scores.samples, "old_logprobs")
    metrics = dict(watch.metrics(run.ranks)) if routing is Routing.REPLAY else {}
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
    return OldScores(batch=batch, scored=scores.samples, metrics=metrics)


def score_reference(run: Run, batch: StepBatch) -> Mapping[int, ScoredSample] | None:
    """Score the samples with the reference model; None when the loss has no KL term."""
    if run.reference is None:
        return None
    replays = run.recipe.replay.reference_routes == "replay" and run.mode is not ReplayMode.DISABLED
    scored = run.reference.score(
        batch.microbatches,
        temperature=run.temperature,
        routing=Routing.REPLAY if replays else Routing.LIVE,
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
    # The agreement of the first mini-batch that was learned from is that of the alignment.
    replay = next((report.replay for report in reports if report.grad_norm is not None), {})
    tally = step_tally([report.tally for report in reports])
    return Update(metrics=tally.finish() | _update_metrics(reports) | dict(replay))


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
    replay: Mapping[str, float]
    """``replay/*`` metrics of its pass; empty when it was skipped, or nothing is replayed."""


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
        return _UpdateReport(tally=tally, grad_norm=None, learning_rate=learning_rate, replay={})
    replays = run.mode is not ReplayMode.DISABLED
    # Later mini-batches drift away from their routes on purpose; only the first can show a misalignment.
    guard = run.guard if is_first else None
    name = f"update {number + 1} of {run.recipe.batch.steps_per_generation}"
    watch = _watch(run, guard, name)
    gradient = run.actor.backward(
        minibatch.microbatches,
        loss,
        temperature=run.temperature,
        routing=Routing.REPLAY if replays else Routing.LIVE,
        watch=_route_watch(run, watch) if replays else None,
        where=f"step {run.step}, {name}",
    )
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
        replay=watch.metrics(run.ranks) if replays else {},
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


def _watch(run: Run, guard: Guard | None, name: str) -> AgreementWatch:
    return AgreementWatch(
        guard,
        num_experts=run.engine.description.num_experts,
        where=f"step {run.step}, rank {run.process.rank}, {name}",
        on_collapse=lambda layers: run.warn(collapse_warning(layers, run.recipe)),
    )


def _route_watch(run: Run, watch: AgreementWatch) -> RouteWatch:
    def observe(
        microbatch: Microbatch,
        rows: Int64[np.ndarray, " watched"],
        live_ids: Integer[np.ndarray, "watched layers topk"],
        layers: Sequence[int],
    ) -> None:
        try:
            watch.observe(microbatch, rows, live_ids, layers)
        except MisalignmentError as error:
            scale = typical_scale(run.actor.modules)
            if scale < _RUINED_SCALE:
                raise
            raise DivergedError(
                f"{error}\nBut first look at the weights, because they no longer look like those of a model: their matrices typically have a root "
                f"mean square of {scale:.3g}, pretrained ones have 0.01 to 0.1, and weights of this size amplify rounding until "
                "engine and trainer have nothing in common. Training has diverged. Lower optimizer.lr (it is "
                f"{run.recipe.optimizer.lr:g}), look at grad_norm in metrics.jsonl, and resume from a checkpoint before it, or "
                "pass --restart"
            ) from error

    return RouteWatch(num_rows=run.recipe.replay.guard_rows, observe=observe)
