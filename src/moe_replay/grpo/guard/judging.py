"""The guard in a step: counts of all ranks are judged before anything is learned from the routes.

Every rank measures the same baseline from what all of them counted, judges its own rows, and all decide together from the
strongest signs. Suspects are scored once more, which costs a healthy step nothing.

In: what a pass saw. Out: Judged: metrics, and the samples that must not be learned from; or MisalignmentError.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from moe_replay.errors import DivergedError, MisalignmentError
from moe_replay.grpo.batch import SampleOrigin, StepBatch
from moe_replay.grpo.guard.collapse import collapse_warning
from moe_replay.grpo.guard.second_look import look_again, mean_gap, rho_of_samples
from moe_replay.grpo.guard.watch import PassWatch, Seen
from moe_replay.grpo.run import Run
from moe_replay.megatron.finite import typical_scale
from moe_replay.megatron.scorer import ScoredSample
from moe_replay.routing import Routing
from moe_replay.routing.guard import (
    Baseline,
    Owner,
    SampleEvidence,
    Verdict,
    join_evidence,
    judge,
)
from moe_replay.routing.guard.sample_tests import CERTAIN

# Typical root mean square of a matrix above which the weights are not those of a working model: pretrained ones have 0.01 to 0.1.
_RUINED_SCALE = 0.5
_NAMED = 4
"""Misaligned samples whose cause is searched: as many as a message spells out."""
_MAX_DRIFT_RHO = 1.0
"""Median over samples of ln(k3 under replay / k3 with live routing), up to which drift explains routes without information."""
_MAX_FALL = 0.1
"""Agreement of a sample may be this much lower in an update than before, under the same weights and routes."""
MISALIGNED, LOST = "misaligned", "lost"
"""Why a sample is kept out of training."""
Origins = Mapping[int, SampleOrigin]
"""Number of a sample in the step -> where it comes from, of all ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What the routes of a pass were found to be; the same on every rank."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    """``replay/*``."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What belongs to a metric and is not a number, for the step's record."""
    dropped: Mapping[int, str] = field(default_factory=dict)
    """Number in the step -> why the sample must not be learned from: `MISALIGNED` or `LOST`."""
    drifted: frozenset[tuple[str, str]] = frozenset()
    """(kind, name) of the groups of samples to which drift has left nearly nothing of their routes."""
    agreement: Mapping[int, float] = field(default_factory=dict)
    """Number in the step -> share of the sample's slots on which live and replayed routes agree."""

    def dropped_here(self, batch: StepBatch) -> set[int]:
        """Return the ids of the samples of this replica that are dropped."""
        return {
            sample_id
            for sample_id, origin in enumerate(batch.origins)
            if origin.number in self.dropped
        }


def judge_engine_routes(
    run: Run, batch: StepBatch, watch: PassWatch, scored: Mapping[int, ScoredSample]
) -> Judged:
    """Judge the engine's routes by the pass that scored old log-probabilities under them (R3); collective.

    Raises:
        MisalignmentError: on every rank, when routes are not those of their tokens and may not be dropped.
        DivergedError: on every rank, when the weights are why.
    """
    seen = watch.together(run)
    if seen is None:
        return Judged()
    origins = _all_origins(run, batch)
    judged = _measured(run, seen, origins)
    guard = run.guard
    if guard is None:
        return judged
    where = f"step {run.step}, old_logprobs"
    baseline = guard.baseline(seen.parts)
    evidence = run.gather(_evidence(watch, baseline))
    known: dict[str, Any] = {
        "gaps": _gaps(run, batch, scored),
        "owners": _owners(run, origins),
    }
    verdict = guard.decide(baseline, evidence, **known)
    num_suspects = len(verdict.suspects)
    if verdict.findings:
        # Suspects are decided by it; of what is certain it names the cause, for a few.
        certain = verdict.misaligned[:_NAMED]
        looks = look_again(run, batch, [*verdict.suspects, *certain], baseline, scored)
        verdict = guard.decide(baseline, evidence, **known, looks=looks)
    drifted = _drifted(run, batch, verdict, scored)
    verdict = _without(verdict, drifted)
    dropped = {finding.sample: LOST for finding in verdict.lost}
    if not verdict.is_clean:
        if not _may_drop(run, verdict):
            raise _stopped(run, verdict, where, beyond=_beyond_dropping(run, verdict))
        dropped |= {finding.sample: MISALIGNED for finding in verdict.misaligned}
    guard.accept(verdict)
    _say_dropped(run, verdict, origins, dropped)
    return replace(
        judged,
        metrics={
            **judged.metrics,
            "replay/guard_margin_nats": verdict.margin_nats,
            "replay/suspects": float(num_suspects),
            "replay/dropped_samples": float(sum(why == MISALIGNED for why in dropped.values())),
            "replay/lost_samples": float(sum(why == LOST for why in dropped.values())),
        },
        details={
            **judged.details,
            "replay/guard_margin_nats": _words(run, origins[verdict.margin_sample]),
            **_dropped_details(run, origins, dropped),
        },
        dropped=dropped,
        drifted=drifted,
    )


def _drifted(
    run: Run, batch: StepBatch, verdict: Verdict, scored: Mapping[int, ScoredSample]
) -> frozenset[tuple[str, str]]:
    """Return the groups whose routes lost their information to drift; collective, and costs a pass if there could be one.

    Wrong routes raise the engine gap under replay alone: of steps in which all routes were wrong, rho was 2 to 7 in the
    median. Where engine and trainer are far apart, replay or not, it is near 0.
    """
    asked = [fault for fault in verdict.faults if fault.may_be_drift]
    # Of weights that are ruined the routes are lost on both sides, and a run must not go on with them.
    if not asked or any(run.gather(typical_scale(run.actor.modules) >= _RUINED_SCALE)):
        return frozenset()
    rho = rho_of_samples(run, batch, scored)
    drifted = set()
    for fault in asked:
        known = [rho[number] for number in fault.samples or rho if number in rho]
        if known and (middle := float(np.median(known))) <= _MAX_DRIFT_RHO:
            drifted.add((fault.kind, fault.name))
            run.warn_once(
                f"drift of {fault.kind} {fault.name}",
                f"{fault}. The engine gap of these samples is as large without replay (rho {middle:.1f}), so engine and trainer "
                "have drifted apart, and the routes are not at fault. The run goes on, but look at rollout_correction/* and "
                "policy versions: is the engine behind, or in a number format too coarse for this model?",
            )
    return frozenset(drifted)


def _without(verdict: Verdict, drifted: Collection[tuple[str, str]]) -> Verdict:
    """Return the verdict without the faults that drift explains."""
    return replace(
        verdict,
        faults=tuple(
            fault
            for fault in verdict.faults
            if not (fault.may_be_drift and (fault.kind, fault.name) in drifted)
        ),
    )


def judge_own_packing(
    run: Run, batch: StepBatch, watch: PassWatch, name: str, *, before: Judged
) -> Judged:
    """Judge the routes of an update before its optimizer moves: the trainer's own (R2), and its own packing of them; collective.

    What is misaligned here is a fault of the trainer and always stops. ``before`` is what the pass of old log-probabilities
    found (R3): what it dropped is not judged again, and what drift has hit then is hit as much now, under the same weights.

    Raises:
        MisalignmentError: on every rank.
    """
    watch.forget(before.dropped)
    seen = watch.together(run)
    if seen is None:
        return Judged()
    origins = _all_origins(run, batch)
    judged = _measured(run, seen, origins)
    if run.guard is None:
        return judged
    guard = run.guard
    baseline = guard.baseline(seen.parts)
    evidence = run.gather(_evidence(watch, baseline))
    verdict = guard.decide(baseline, evidence, owners=_owners(run, origins), looks={})
    verdict = replace(
        verdict,
        findings=tuple(
            finding
            for finding in verdict.misaligned
            # Routes that the trainer recorded itself agree wholly.
            if finding.test in CERTAIN
            or finding.agreement < before.agreement.get(finding.sample, 1.0) - _MAX_FALL
        ),
        faults=tuple(fault for fault in verdict.faults if fault.kind != "server"),
    )
    verdict = _without(verdict, before.drifted)
    if not verdict.is_clean:
        raise _stopped(run, verdict, f"step {run.step}, {name}")
    if run.mode.passes.old is Routing.RECORD:
        # In R3 the pass before has been remembered, and this one sees a part of the same samples.
        guard.accept(verdict)
    return replace(
        judged,
        metrics={
            **judged.metrics,
            "replay/guard_margin_nats": verdict.margin_nats,
            "replay/suspects": 0.0,
            "replay/dropped_samples": 0.0,
            "replay/lost_samples": 0.0,
        },
    )


def _evidence(watch: PassWatch, baseline: Baseline) -> SampleEvidence | None:
    """Return the strongest signs in the rows of this rank."""
    held = (counts for counts in watch.counts.values() if len(counts.own))
    return join_evidence([judge(counts, baseline) for counts in held])


def _measured(run: Run, seen: Seen, origins: Origins) -> Judged:
    """Return what is told of a pass whether or not a guard judges it."""
    if seen.collapsed:
        run.warn(collapse_warning(seen.collapsed, run.recipe))
    least = _words(run, origins[seen.least_sample])
    table = seen.table
    return Judged(
        metrics=seen.metrics(origins),
        details={"replay/agreement_min_sample": least},
        agreement=dict(zip(table.sample_ids.tolist(), table.agreement.tolist(), strict=True)),
    )


def _all_origins(run: Run, batch: StepBatch) -> Origins:
    """Return the origins of the samples of all replicas; collective."""
    spoken = batch.origins if run.replica.is_leader else ()
    return {origin.number: origin for part in run.gather(spoken) for origin in part}


def _owners(run: Run, origins: Origins) -> dict[int, Owner]:
    return {
        number: Owner(
            server=origin.server or None,
            policy_version=run.policy_version,
            prompt=origin.item,
        )
        for number, origin in origins.items()
    }


def _gaps(run: Run, batch: StepBatch, scored: Mapping[int, ScoredSample]) -> dict[int, float]:
    """Return the mean engine gap of every sample that has tokens, by number in the step; collective."""
    mine = {
        batch.origins[sample.sample_id].number: mean_gap(sample, scored)
        for sample in batch.samples
        if sample.sampled_here and sample.completion_length
    }
    return {number: gap for part in run.gather(mine) for number, gap in part.items()}


def _may_drop(run: Run, verdict: Verdict) -> bool:
    """Tell whether a step goes on without its misaligned samples: they are few, and no more than samples is wrong."""
    replay = run.recipe.replay
    most = replay.max_dropped_frac * len(verdict.sample_ids)
    return (
        replay.on_misaligned == "drop"
        and len(verdict.misaligned) <= most
        and all(fault.kind == "server" for fault in verdict.faults)
    )


def _stopped(
    run: Run, verdict: Verdict, where: str, *, beyond: str = ""
) -> MisalignmentError | DivergedError:
    """Return the error that ends the run; ``beyond`` says why dropping does not cover it."""
    said = verdict.message(where)
    scale = typical_scale(run.actor.modules)
    if scale >= _RUINED_SCALE:
        return DivergedError(
            f"{said}\nBut first look at the weights, because they no longer look like those of a model: their matrices typically have a root "
            f"mean square of {scale:.3g}, pretrained ones have 0.01 to 0.1, and weights of this size amplify rounding until "
            "engine and trainer have nothing in common. Training has diverged. Lower optimizer.lr (it is "
            f"{run.recipe.optimizer.lr:g}), look at grad_norm in metrics.jsonl, and resume from a checkpoint before it, or "
            "pass --restart"
        )
    return MisalignmentError(said + beyond)


def _beyond_dropping(run: Run, verdict: Verdict) -> str:
    """Say why a run that may drop samples stops all the same."""
    replay, num_samples = run.recipe.replay, len(verdict.sample_ids)
    if replay.on_misaligned == "stop":
        return ""
    return (
        f"\nreplay.on_misaligned is 'drop', and this is more than it covers: {len(verdict.misaligned)} of {num_samples} samples, "
        f"where replay.max_dropped_frac = {replay.max_dropped_frac:g} allows {int(replay.max_dropped_frac * num_samples)}, or "
        "a fault of a rank, a layer or the whole step"
    )


def _say_dropped(run: Run, verdict: Verdict, origins: Origins, dropped: Mapping[int, str]) -> None:
    """Warn of samples that are kept out of training, and of servers whose faults have added up."""
    for why in sorted(set(dropped.values())):
        of = Counter(origins[number].server for number, said in dropped.items() if said == why)
        servers = ", ".join(f"{count} of {name}" for name, count in sorted(of.items()) if name)
        text = (
            "have routes that are not their own"
            if why == MISALIGNED
            else "lost their routes to drift"
        )
        run.warn(
            f"{sum(of.values())} of {len(verdict.sample_ids)} samples {text} and are not trained on"
            f"{f' ({servers})' if servers else ''}:\n{verdict.summary()}"
        )
    if not dropped:
        for fault in verdict.faults:
            run.warn(str(fault))


def _words(run: Run, origin: SampleOrigin) -> dict[str, Any]:
    """Say in plain values which sample is meant."""
    return {
        "sample": origin.number,
        "item": origin.item,
        "completion": origin.completion,
        "server": origin.server,
        "policy_version": run.policy_version,
    }


def _dropped_details(
    run: Run, origins: Origins, dropped: Mapping[int, str]
) -> dict[str, list[dict[str, Any]]]:
    """Return which samples were dropped and lost, under the names of their metrics."""
    found: dict[str, list[dict[str, Any]]] = {}
    for number, why in sorted(dropped.items()):
        name = "replay/dropped_samples" if why == MISALIGNED else "replay/lost_samples"
        found.setdefault(name, []).append(_words(run, origins[number]))
    return found
