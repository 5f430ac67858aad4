"""The station that learns: one optimizer step for each mini-batch in which something trains."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch

from moe_replay.batch import Microbatch, Sample
from moe_replay.errors import UpdateError
from moe_replay.grpo.guard.judging import judge_own_packing
from moe_replay.grpo.guard.old_scores import checked_scores, old_pass, watch_old
from moe_replay.grpo.guard.watch import PassWatch
from moe_replay.grpo.loss.policy import LossStatistics, policy_loss, step_tally, update_tally
from moe_replay.grpo.loss.rows import BatchSize, TokenRows
from moe_replay.grpo.metrics import Tally
from moe_replay.grpo.run import Run
from moe_replay.grpo.types import Judged, OldScores, Update
from moe_replay.megatron.actor import Gradient
from moe_replay.megatron.backward import BackwardWork, sum_over_context
from moe_replay.megatron.scorer import ScoredSample
from moe_replay.routing import Routing


def update_policy(run: Run, old: OldScores, reference: Mapping[int, ScoredSample] | None) -> Update:
    """Take the step's optimizer steps, one for each mini-batch in which something trains.

    Raises:
        DivergedError: on every rank, before the optimizer moves, when a gradient is not finite.
        MisalignmentError: likewise, when the guard finds routes that are not those of their tokens.
        UpdateError: likewise, when it is 0 where it cannot be, or gradients are switched off.
    """
    reports: list[_UpdateReport] = []
    if run.recipe.why_old_pass is None:
        old, report = _score_and_update(run, old, reference)
        reports.append(report)
    else:
        for number, minibatch in enumerate(old.batch.minibatches):
            # Later mini-batches drift away from their routes by design, which is measured; the
            # first shows whether the update packs them correctly.
            judges = all(report.grad_norm is None for report in reports)
            reports.append(_update_once(run, old, reference, minibatch, number, judges=judges))
    judged = next((report.judged for report in reports if report.grad_norm is not None), Judged())
    tally = step_tally([report.tally for report in reports])
    metrics = tally.finish() | _update_metrics(reports) | dict(judged.metrics)
    return Update(old=old, metrics=metrics, details=judged.details)


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
    """What was found in the routes of its pass; nothing when they were not looked at."""


def _score_and_update(
    run: Run, old: OldScores, reference: Mapping[int, ScoredSample] | None
) -> tuple[OldScores, _UpdateReport]:
    """Take the step's only update, whose forward pass gives the old log-probabilities too.

    They are checked and judged before the optimizer moves. If samples are dropped then, the
    gradient is computed again without them.
    """
    batch, name = old.batch, _name(run, 0)
    where = f"step {run.step}, {name}"
    loss = MinibatchLoss(run, None, reference, batch.samples)
    work = BackwardWork(
        microbatches=batch.microbatches,
        loss=loss,
        temperature=run.temperature,
        routing=run.mode.passes.update,
        entropies_learn=loss.takes_entropies,
    )
    if loss.is_idle:
        scored, _ = old_pass(run, batch)
    else:
        watch = watch_old(run, batch)
        found = run.actor.forward_backward(
            work,
            watch=watch.route_watch if watch is not None else None,
            with_scores=True,
            where=where,
        )
        scored = checked_scores(run, batch, found, watch, where=name)
    old = replace(scored, metrics={**old.metrics, **scored.metrics})
    if loss.is_idle or old.judged.dropped:
        (minibatch,) = old.batch.minibatches
        return old, _update_once(run, old, reference, minibatch, 0, judges=False)
    gradient = run.actor.measure_gradient(work, where=where)
    return old, _step_along(run, gradient, loss, name, Tally())


def _update_once(
    run: Run,
    old: OldScores,
    reference: Mapping[int, ScoredSample] | None,
    minibatch: Sequence[Microbatch],
    number: int,
    *,
    judges: bool,
) -> _UpdateReport:
    """Take one optimizer step; none if nothing trains, or momentum would move the weights.

    ``judges`` says that the routes of its pass are to be judged, where some are replayed.
    """
    samples = [sample for microbatch in minibatch for sample in microbatch.samples]
    loss = MinibatchLoss(run, old.scored, reference, samples)
    if loss.is_idle:
        learning_rate = run.actor.learning_rate
        run.actor.skip()
        tally = Tally()
        tally.add_sum("loss", 0.0)
        return _UpdateReport(
            tally=tally, grad_norm=None, learning_rate=learning_rate, judged=Judged()
        )
    passes = run.mode.passes
    # Without a guard only this pass measures R2's agreement.
    judges = judges and (run.guard is not None or passes.old is not Routing.REPLAY)
    several = run.recipe.batch.steps_per_generation > 1
    watches = passes.update is Routing.REPLAY and (judges or several)
    watch = PassWatch(old.batch.origins) if watches else None
    name = _name(run, number)
    work = BackwardWork(
        microbatches=minibatch,
        loss=loss,
        temperature=run.temperature,
        routing=passes.update,
        entropies_learn=loss.takes_entropies,
    )
    where = f"step {run.step}, {name}"
    run.actor.forward_backward(
        work, watch=watch.route_watch if watch is not None else None, where=where
    )
    gradient = run.actor.measure_gradient(work, where=where)
    drift, judged = Tally(), Judged()
    if watch is not None:
        watch.forget(old.judged.dropped)
        drift = watch.drift_tally(number + 1) if several else drift
    if watch is not None and judges:
        judged = judge_own_packing(run, old.batch, watch, name, before=old.judged)
    return replace(_step_along(run, gradient, loss, name, drift), judged=judged)


def _step_along(
    run: Run, gradient: Gradient, loss: MinibatchLoss, name: str, drift: Tally
) -> _UpdateReport:
    """Take the optimizer's step along a gradient, and report it; collective.

    ``drift`` is what this rank saw of live beside replayed routes.
    """
    loss.require_pull(run, gradient.norm, where=f"step {run.step}, {name}")
    statistics = loss.statistics if run.replica.computes_loss else []
    part = Tally.merge([update_tally(statistics, loss.keys), drift])
    # Infinite where no sample trains and only a loss of the router does.
    if loss.entropy_threshold is not None and np.isfinite(loss.entropy_threshold):
        part.add_mean("entropy/threshold", total=float(loss.entropy_threshold))
    if gradient.balancing_loss is not None:
        part.add_sum("load_balancing_loss", gradient.balancing_loss)
    tally = Tally.merge(run.ranks.gather(part))
    learning_rate = run.actor.learning_rate
    run.actor.step()
    return _UpdateReport(
        tally=tally, grad_norm=gradient.norm, learning_rate=learning_rate, judged=Judged()
    )


def _name(run: Run, number: int) -> str:
    return f"update {number + 1} of {run.recipe.batch.steps_per_generation}"


def _update_metrics(reports: Sequence[_UpdateReport]) -> dict[str, float]:
    """Return gradient norms and learning rates: of the step, and of each of several updates."""
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


class MinibatchLoss:
    """The loss of one mini-batch, microbatch by microbatch, and what it saw."""

    def __init__(
        self,
        run: Run,
        old: Mapping[int, ScoredSample] | None,
        reference: Mapping[int, ScoredSample] | None,
        samples: Sequence[Sample],
    ) -> None:
        """Measure the whole mini-batch, of which ``samples`` are this replica's; collective.

        ``old`` is None where this pass is the one that finds the old log-probabilities.
        """
        self.keys = run.recipe.grpo
        self.takes_entropies = self.keys.entropy_coef > 0
        self.old, self.reference = old, reference
        self.statistics: list[LossStatistics] = []
        self.samples = samples
        # Every rank of a replica has the same samples; one of them counts.
        speaks = run.replica.is_leader
        counted = [s.completion_length for s in samples if s.trains and speaks]
        always = self.keys.has_kl_term or self.takes_entropies
        pulls = [s.trains and (np.float32(s.advantage) != 0 or always) for s in samples]
        gathered = run.ranks.gather([len(counted), sum(counted), any(pulls)])
        self.is_idle = not (any(part[2] for part in gathered) or run.recipe.megatron.trains_routers)
        self.entropy_threshold, num_uncertain = self._entropy_threshold(run)
        self.batch = BatchSize(
            num_samples=max(1, sum(part[0] for part in gathered)),
            num_tokens=max(1, sum(part[1] for part in gathered)),
            max_completion_length=run.recipe.rollout.max_completion_length,
            num_uncertain=max(1, num_uncertain),
        )

    def _entropy_threshold(self, run: Run) -> tuple[np.float64 | None, int]:
        """Return the entropy from which on tokens count, and how many do; collective.

        One of all tokens of the mini-batch that train, whatever rank holds them. None: all count.

        Source: arXiv 2506.01939.
        """
        if self.keys.top_entropy_quantile == 1:
            return None, 0
        assert self.old is not None
        own = [self.old[s.sample_id].entropies for s in self.samples if s.trains]
        parts = run.ranks.gather_items(own if run.replica.is_leader else [], lambda e: e.nbytes)
        # One more, which is empty, because numpy joins nothing to nothing.
        held = [*chain.from_iterable(parts), np.zeros(0, np.float32)]
        every = np.concatenate(held).astype(np.float64)
        if not len(every):
            return np.float64(np.inf), 0
        threshold = np.quantile(every, 1 - self.keys.top_entropy_quantile)
        return np.float64(threshold), int((every >= threshold).sum())

    def __call__(
        self,
        microbatch: Microbatch,
        new_logprobs: torch.Tensor,
        entropies: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the microbatch's part of the loss."""

        def rows(values: Sequence[np.ndarray]) -> torch.Tensor:
            placed = microbatch.place(values, fill=0.0)[microbatch.predicts_sampled]
            return torch.from_numpy(placed).to(new_logprobs.device)

        def of_samples(values: Sequence[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32, device=new_logprobs.device)

        samples, old, reference = microbatch.samples, self.old, self.reference
        numbers = [np.full(s.completion_length, i) for i, s in enumerate(samples)]
        sample = rows(numbers).long()
        uncertain = None
        if old is not None and self.entropy_threshold is not None:
            found = [old[s.sample_id].entropies >= self.entropy_threshold for s in samples]
            uncertain = rows(found).bool()
        tokens = TokenRows(
            new_logprobs=new_logprobs,
            old_logprobs=rows([old[s.sample_id].token_logprobs for s in samples])
            if old is not None
            else new_logprobs.detach(),
            rollout_logprobs=rows([s.rollout_logprobs for s in samples])
            if self.keys.compares_engine
            else None,
            ref_logprobs=rows([reference[s.sample_id].token_logprobs for s in samples])
            if reference is not None
            else None,
            entropies=entropies,
            is_uncertain=uncertain,
            advantages=of_samples([s.advantage for s in samples])[sample],
            trains=of_samples([s.trains for s in samples])[sample].bool(),
            sample=sample,
            lengths=of_samples([s.completion_length for s in samples]),
            sum_over_ranks=sum_over_context,
        )
        loss, statistics = policy_loss(tokens, self.batch, self.keys)
        self.statistics.append(statistics)
        return loss

    def require_pull(self, run: Run, grad_norm: float, *, where: str) -> None:
        """Raise `UpdateError` when the gradient is 0 although samples pull at weights; collective.

        It is rightly 0 where every token is clipped or certain, or where equal completions with
        opposite advantages cancel: such a step goes on.
        """
        if grad_norm != 0:
            return
        speaks = run.replica.computes_loss
        pulled = sum(part.num_pulled for part in self.statistics) if speaks else 0
        # Equal completions of a prompt may train on different replicas.
        gathered = run.ranks.gather((pulled, self._pulls() if run.replica.is_leader else {}))
        tokens = int(sum(count for count, _ in gathered))
        if tokens and _pull_one_way([pulls for _, pulls in gathered]):
            raise UpdateError(
                f"{where}: the norm of the gradient is exactly 0, though {tokens} sampled tokens have "
                "an advantage, are not clipped and were not certain. The loss has lost its connection "
                "to the weights: they are frozen (requires_grad is off), or a hook or changed module "
                "detaches what it returns. No weight was changed by this update and nothing was pushed"
            )

    def _pulls(self) -> dict[bytes, tuple[float, float]]:
        """Return the sum of advantages, and of their sizes, of each token sequence held here."""
        sums: dict[bytes, tuple[float, float]] = {}
        for sample in self.samples:
            # Equal sequences have equal lengths, and so equal weights in every loss.
            key = hashlib.blake2b(sample.token_ids.tobytes(), digest_size=16).digest()
            pull = sample.advantage * sample.trains
            total, size = sums.get(key, (0.0, 0.0))
            sums[key] = (total + pull, size + abs(pull))
        return sums


def _pull_one_way(replicas: Iterable[Mapping[bytes, tuple[float, float]]]) -> bool:
    """Whether some token sequence has advantages that do not cancel over all replicas."""
    sums: dict[bytes, tuple[float, float]] = {}
    for replica in replicas:
        for key, (pull, amount) in replica.items():
            total, size = sums.get(key, (0.0, 0.0))
            sums[key] = (total + pull, size + amount)
    return any(abs(total) > 1e-6 * size for total, size in sums.values())
