"""The stations that learn: old and reference log-probabilities, and the update, under the routes of the replay mode.

In: samples. Out: OldScores, Update, changed weights. Called by: grpo.loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from moe_replay.batch import Microbatch, Sample
from moe_replay.grpo.batching import MiniBatch, StepBatch, recorded_coverage, with_routes
from moe_replay.grpo.collapse import collapse_warning
from moe_replay.grpo.loss import (
    BatchSize,
    LossInputs,
    LossSettings,
    LossStatistics,
    policy_loss,
    sample_weights,
)
from moe_replay.grpo.metrics import Tally, engine_gap, step_tally, update_tally
from moe_replay.grpo.run import Run
from moe_replay.grpo.watch import AgreementWatch
from moe_replay.megatron.scorer import RouteWatch, Routing, ScoredSample
from moe_replay.routing import Guard, ReplayMode


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
    metrics = dict(watch.metrics(run.group, device=run.device)) if routing is Routing.REPLAY else {}
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
    return run.reference.score(
        batch.microbatches,
        temperature=run.temperature,
        routing=Routing.REPLAY if replays else Routing.LIVE,
    ).samples


def update_policy(run: Run, old: OldScores, reference: Mapping[int, ScoredSample] | None) -> Update:
    """Take the step's optimizer steps, one for each mini-batch."""
    parts: list[Tally] = []
    metrics: dict[str, float] = {}
    for number, minibatch in enumerate(old.batch.minibatches):
        part, result = _update_once(run, old, reference, minibatch, number)
        parts.append(part)
        # The agreement of the first mini-batch is that of the alignment.
        metrics = (
            result | metrics
            if number == 0
            else metrics
            | {name: value for name, value in result.items() if not name.startswith("replay/")}
        )
    return Update(metrics=step_tally(parts).finish() | metrics)


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


class _MinibatchLoss:
    """The loss of one mini-batch, microbatch by microbatch, and what it saw."""

    def __init__(
        self,
        run: Run,
        old: OldScores,
        reference: Mapping[int, ScoredSample] | None,
        samples: Sequence[Sample],
    ) -> None:
        grpo = run.recipe.grpo
        self.settings = LossSettings(
            loss_type=grpo.loss_type,
            epsilon=grpo.epsilon,
            epsilon_high=grpo.epsilon_high,
            beta=grpo.beta,
        )
        self.old, self.reference = old.scored, reference
        self.statistics: list[LossStatistics] = []
        lengths = [sample.completion_length for sample in samples]
        trains = [sample.trains for sample in samples]
        counted = [length for length, counts in zip(lengths, trains, strict=True) if counts]
        # Every rank of a replica knows the same samples; one of them counts.
        speaks = int(run.replica.is_leader)
        gathered = run.gather([speaks * len(counted), speaks * sum(counted)])
        weights = sample_weights(
            lengths,
            trains,
            loss_type=grpo.loss_type,
            whole=BatchSize(
                num_samples=sum(part[0] for part in gathered),
                num_tokens=sum(part[1] for part in gathered),
            ),
            max_completion_length=run.recipe.rollout.max_completion_length,
        )
        ids = [sample.sample_id for sample in samples]
        self.weights = dict(zip(ids, weights, strict=True))

    def __call__(self, microbatch: Microbatch, new_logprobs: torch.Tensor) -> torch.Tensor:
        """Return the microbatch's part of the loss."""

        def rows(values: Sequence[np.ndarray]) -> torch.Tensor:
            placed = microbatch.place(values, fill=0.0)[microbatch.predicts_sampled]
            return torch.from_numpy(placed).to(new_logprobs.device)

        samples, reference = microbatch.samples, self.reference
        inputs = LossInputs(
            new_logprobs=new_logprobs,
            old_logprobs=rows([self.old[s.sample_id].token_logprobs for s in samples]),
            ref_logprobs=rows([reference[s.sample_id].token_logprobs for s in samples])
            if reference is not None
            else None,
            advantages=rows([np.full(s.completion_length, s.advantage) for s in samples]),
            weights=rows(
                [np.full(s.completion_length, self.weights[s.sample_id]) for s in samples]
            ),
        )
        loss, statistics = policy_loss(inputs, self.settings)
        self.statistics.append(statistics)
        return loss


def _update_once(
    run: Run,
    old: OldScores,
    reference: Mapping[int, ScoredSample] | None,
    minibatch: MiniBatch,
    number: int,
) -> tuple[Tally, dict[str, float]]:
    """Take one optimizer step; return its loss tally over all ranks and its other metrics."""
    replays = run.mode is not ReplayMode.DISABLED
    loss = _MinibatchLoss(run, old, reference, minibatch.samples)
    # Later mini-batches drift away from their routes on purpose; only the first can show a misalignment.
    guard = run.guard if number == 0 else None
    count = run.recipe.batch.steps_per_generation
    watch = _watch(run, guard, f"update {number + 1} of {count}")
    result = run.actor.update(
        minibatch.microbatches,
        loss,
        temperature=run.temperature,
        routing=Routing.REPLAY if replays else Routing.LIVE,
        watch=_route_watch(run, watch) if replays else None,
    )
    statistics = loss.statistics if run.replica.computes_loss else []
    part = update_tally(statistics, with_kl=reference is not None)
    tally = Tally.merge(Tally.from_plain(other) for other in run.gather(part.to_plain()))
    metrics = {"grad_norm": result.grad_norm, "learning_rate": result.learning_rate}
    if replays:
        metrics |= watch.metrics(run.group, device=run.device)
    return tally, metrics


def _watch(run: Run, guard: Guard | None, name: str) -> AgreementWatch:
    return AgreementWatch(
        guard,
        num_experts=run.engine.description.num_experts,
        where=f"step {run.step}, rank {run.process.rank}, {name}",
        on_collapse=lambda layers: run.warn(collapse_warning(layers, run.recipe)),
    )


def _route_watch(run: Run, watch: AgreementWatch) -> RouteWatch:
    return RouteWatch(num_rows=run.recipe.replay.guard_rows, observe=watch.observe)
