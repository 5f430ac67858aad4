"""The guard in a step: routes are judged by the counts of all ranks before anything is learned.

Every rank measures the same baseline from what all of them counted, judges its own rows, and all
decide together from the strongest signs. Suspects are scored again, which costs a healthy step
nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from moe_replay.errors import DivergedError, MisalignmentError
from moe_replay.grpo.guard.collapse import collapse_warning
from moe_replay.grpo.guard.second_look import SecondLooks, mean_gap
from moe_replay.grpo.guard.watch import PassWatch
from moe_replay.grpo.run import Run
from moe_replay.grpo.telling import samples_with_tokens
from moe_replay.grpo.types import LOST, MISALIGNED, Judged, SampleOrigin, StepBatch
from moe_replay.megatron.finite import typical_scale
from moe_replay.megatron.scorer import ScoredSample
from moe_replay.routing import Routing
from moe_replay.routing.guard import (
    Baseline,
    Guard,
    Owner,
    SampleEvidence,
    StepTable,
    Verdict,
    drift_rho,
    join_evidence,
    judge,
)
from moe_replay.routing.guard.sample_tests import CERTAIN

_RUINED_SCALE = 0.5
"""Typical root mean square of a matrix from which on the weights are not those of a working model.

Pretrained ones have 0.01 to 0.1.
"""
_NAMED = 4
"""Misaligned samples whose cause is searched: as many as a message spells out."""
_MAX_FALL = 0.1
"""How much lower a sample's agreement may be in an update, under the same weights and routes."""
_QUANTILES = (0.05, 0.25, 0.5)
_NUM_LOWEST = 4
"""Samples of each step that its record names, from the lowest agreement on."""
Origins = Mapping[int, SampleOrigin]
"""Index of a sample in the step -> where it comes from, of all ranks."""
_Case = tuple[Guard, Baseline, list[SampleEvidence | None], Origins]


def judge_engine_routes(
    run: Run,
    batch: StepBatch,
    watch: PassWatch,
    scored: Mapping[int, ScoredSample],
    *,
    where: str,
) -> Judged:
    """Judge the engine's routes by the first pass under them (R3); collective.

    That is the pass of old log-probabilities, or the update's before its optimizer moves. ``where``
    names it in errors.

    Raises:
        MisalignmentError: on every rank, when routes are not those of their tokens and may not be
            dropped.
        DivergedError: on every rank, when the weights are why.
    """
    judged, case = _measure(run, batch, watch)
    if case is None:
        return _with_flips(run, judged, watch)
    guard, baseline, evidence, origins = case
    again = SecondLooks(run=run, batch=batch, scored=scored)
    gaps, owners = _gaps(run, batch, scored), _owners(origins)
    verdict = guard.decide(baseline, evidence, gaps=gaps, owners=owners)
    num_suspects = len(verdict.suspects)
    if verdict.findings:
        # Looks decide about suspects; of what is certain they name the cause, for a few.
        looks = again.at([*verdict.suspects, *verdict.misaligned[:_NAMED]], baseline)
        verdict = guard.decide(baseline, evidence, gaps=gaps, owners=owners, looks=looks)
    drifted = _drifted(run, again, verdict)
    verdict = verdict.without(drifted)
    dropped = {finding.sample: LOST for finding in verdict.lost}
    if not verdict.is_clean:
        if not _may_drop(run, verdict):
            raise _stopped(
                run, verdict, f"step {run.step}, {where}", beyond=_beyond_dropping(run, verdict)
            )
        dropped |= {finding.sample: MISALIGNED for finding in verdict.misaligned}
    guard.accept(verdict)
    _warn_of_dropped(run, verdict, origins, dropped)
    judged = _with_flips(run, replace(judged, dropped=dropped), watch)
    return replace(
        judged,
        metrics={**judged.metrics, **_guard_metrics(verdict, num_suspects, dropped)},
        details={
            **judged.details,
            "replay/guard_margin_nats": _words(origins[verdict.margin_sample]),
            **_dropped_details(origins, dropped),
        },
        drifted=drifted,
    )


def _with_flips(run: Run, judged: Judged, watch: PassWatch) -> Judged:
    """Return it with the flips of the samples whose tokens are kept; collective."""
    keys = run.recipe.logging
    if not keys.completions or not keys.num_with_tokens:
        return judged
    chosen = samples_with_tokens(judged.agreement, judged.dropped, num_kept=keys.num_with_tokens)
    return replace(judged, flips=watch.flips_of(chosen, run.ranks))


def judge_own_packing(
    run: Run, batch: StepBatch, watch: PassWatch, name: str, *, before: Judged
) -> Judged:
    """Judge the routes of an update before its optimizer moves; collective.

    They are the trainer's own (R2), or its own packing of the engine's (R3): what is misaligned
    here is a fault of the trainer and always stops. ``before`` is what the pass of old
    log-probabilities found (R3): what drift had hit then, it hits as much now, under the same
    weights. ``watch`` has forgotten what was dropped then.

    Raises:
        MisalignmentError: on every rank.
    """
    judged, case = _measure(run, batch, watch)
    if case is None:
        return judged
    guard, baseline, evidence, origins = case
    verdict = guard.decide(baseline, evidence, owners=_owners(origins), looks={})
    verdict = replace(
        verdict,
        findings=tuple(
            finding
            for finding in verdict.misaligned
            # Routes that the trainer recorded itself agree completely.
            if finding.test in CERTAIN
            or finding.agreement < before.agreement.get(finding.sample, 1.0) - _MAX_FALL
        ),
        faults=tuple(fault for fault in verdict.faults if fault.kind != "server"),
    )
    verdict = verdict.without(before.drifted)
    if not verdict.is_clean:
        raise _stopped(run, verdict, f"step {run.step}, {name}")
    if run.mode.passes.old is Routing.RECORD:
        # In R3 the pass before is remembered already, and this one sees a part of its samples.
        guard.accept(verdict)
    return replace(judged, metrics={**judged.metrics, **_guard_metrics(verdict, 0, {})})


def _guard_metrics(
    verdict: Verdict, num_suspects: int, dropped: Mapping[int, str]
) -> dict[str, float]:
    reasons = Counter(dropped.values())
    return {
        "replay/guard_margin_nats": verdict.margin_nats,
        "replay/suspects": float(num_suspects),
        "replay/dropped_samples": float(reasons[MISALIGNED]),
        "replay/lost_samples": float(reasons[LOST]),
    }


def _drifted(run: Run, again: SecondLooks, verdict: Verdict) -> frozenset[tuple[str, str]]:
    """Return the groups whose routes drift has left no information; collective.

    Costs a pass only where drift could be the cause.
    """
    asked = [fault for fault in verdict.faults if fault.may_be_drift]
    # With ruined weights both sides have lost their routes, and a run must not go on with them.
    if not asked or any(run.ranks.gather(typical_scale(run.actor.modules) >= _RUINED_SCALE)):
        return frozenset()
    rho = again.rho_of_samples()
    drifted = set()
    for fault in asked:
        if (middle := drift_rho(fault, rho)) is not None:
            drifted.add((fault.kind, fault.name))
            run.journal.warn_once(
                f"drift of {fault.kind} {fault.name}",
                f"{fault}. The engine gap of these samples is as large without replay (rho "
                f"{middle:.1f}), so engine and trainer have drifted apart, and the routes are not at "
                "fault. The run goes on, but look at rollout_correction/* and policy versions: is "
                "the engine behind, or is its number format too coarse for this model?",
            )
    return frozenset(drifted)


def _measure(run: Run, batch: StepBatch, watch: PassWatch) -> tuple[Judged, _Case | None]:
    """Return what a pass reports with or without a guard, and what a guard judges; collective."""
    seen = watch.together(run.ranks)
    if seen is None:
        return Judged(), None
    spoken = batch.origins if run.replica.is_leader else ()
    origins = {origin.index: origin for part in run.ranks.gather(spoken) for origin in part}
    if seen.collapsed:
        run.journal.warn(collapse_warning(seen.collapsed, run.recipe))
    table = seen.table
    least = int(table.sample_ids[table.agreement.argmin()])
    judged = Judged(
        metrics=seen.metrics(origins),
        details={
            "replay/agreement_min_sample": _words(origins[least]),
            "replay/agreement": _spread(table, origins),
            "replay/flip_frac": seen.flips_by_layer(),
        },
        agreement=dict(zip(table.sample_ids.tolist(), table.agreement.tolist(), strict=True)),
    )
    if run.guard is None:
        return judged, None
    versions = {index: origin.policy_version for index, origin in origins.items()}
    baseline = run.guard.baseline(seen.parts, versions=versions)
    held = (counts for counts in watch.counts.values() if len(counts.own))
    # The strongest signs in the rows of each rank.
    evidence = run.ranks.gather(join_evidence([judge(counts, baseline) for counts in held]))
    return judged, (run.guard, baseline, evidence, origins)


def _owners(origins: Origins) -> dict[int, Owner]:
    # Samples of one engine are dealt to many ranks, and stand out together all the same.
    several = len({origin.rank for origin in origins.values()}) > 1
    own_engine = "engine of rank {}" if several else ""
    return {
        index: Owner(
            server=origin.server or own_engine.format(origin.rank) or None,
            policy_version=origin.policy_version,
            prompt=origin.item,
        )
        for index, origin in origins.items()
    }


def _gaps(run: Run, batch: StepBatch, scored: Mapping[int, ScoredSample]) -> dict[int, float]:
    """Return the mean engine gap of samples that have tokens, by index in the step; collective."""
    mine = {
        batch.origins[sample.sample_id].index: mean_gap(sample, scored)
        for sample in batch.samples
        if sample.reported_here and sample.completion_length
    }
    return {index: gap for part in run.ranks.gather(mine) for index, gap in part.items()}


def _may_drop(run: Run, verdict: Verdict) -> bool:
    """Whether a step goes on without its misaligned samples: few, and nothing else is wrong."""
    replay = run.recipe.replay
    limit = replay.max_dropped_frac * len(verdict.sample_ids)
    return (
        replay.on_misaligned == "drop"
        and len(verdict.misaligned) <= limit
        and all(fault.kind == "server" for fault in verdict.faults)
    )


def _stopped(
    run: Run, verdict: Verdict, where: str, *, beyond: str = ""
) -> MisalignmentError | DivergedError:
    """Return the error that ends the run; ``beyond`` says why dropping does not cover it."""
    message = verdict.message(where)
    scale = typical_scale(run.actor.modules)
    if scale >= _RUINED_SCALE:
        return DivergedError(
            f"{message}\nBut first look at the weights, because they no longer look like those of a "
            f"model: their matrices typically have a root mean square of {scale:.3g}, pretrained "
            "ones have 0.01 to 0.1, and weights of this size amplify rounding until engine and "
            "trainer have nothing in common. Training has diverged. Lower optimizer.lr (it is "
            f"{run.recipe.optimizer.lr:g}), look at grad_norm in metrics.jsonl, and resume from an "
            "earlier checkpoint, or pass --restart"
        )
    return MisalignmentError(message + beyond)


def _beyond_dropping(run: Run, verdict: Verdict) -> str:
    """Say why a run that may drop samples stops all the same."""
    replay, num_samples = run.recipe.replay, len(verdict.sample_ids)
    if replay.on_misaligned == "stop":
        return ""
    return (
        "\nreplay.on_misaligned is 'drop', and this is more than it covers: "
        f"{len(verdict.misaligned)} of {num_samples} samples, where replay.max_dropped_frac = "
        f"{replay.max_dropped_frac:g} allows {int(replay.max_dropped_frac * num_samples)}, or a "
        "fault of a rank, a layer or the whole step"
    )


def _warn_of_dropped(
    run: Run, verdict: Verdict, origins: Origins, dropped: Mapping[int, str]
) -> None:
    """Warn of samples that are kept out of training, and of servers whose faults have added up."""
    texts = {
        LOST: "lost their routes to drift",
        MISALIGNED: "have routes that are not their own",
    }
    for why in sorted(set(dropped.values())):
        of = Counter(origins[index].server for index, reason in dropped.items() if reason == why)
        servers = ", ".join(f"{count} of {name}" for name, count in sorted(of.items()) if name)
        run.journal.warn(
            f"{sum(of.values())} of {len(verdict.sample_ids)} samples {texts[why]} and are not "
            f"trained on{f' ({servers})' if servers else ''}:\n{verdict.summary()}"
        )
    if not dropped:
        for fault in verdict.faults:
            run.journal.warn(str(fault))


def _words(origin: SampleOrigin) -> dict[str, Any]:
    """Say in plain values which sample is meant."""
    return {
        "sample": origin.index,
        "item": origin.item,
        "completion": origin.completion,
        "server": origin.server,
        "policy_version": origin.policy_version,
    }


def _spread(table: StepTable, origins: Origins) -> dict[str, Any]:
    """Return how the agreement of samples spreads, and which have the lowest."""
    agreement = table.agreement
    order = np.argsort(agreement, kind="stable")[:_NUM_LOWEST]
    lowest = [
        _words(origins[int(table.sample_ids[at])]) | {"agreement": round(float(agreement[at]), 6)}
        for at in order
    ]
    quantiles = np.quantile(agreement, _QUANTILES).round(6).tolist()
    names = [f"{100 * q:g}" for q in _QUANTILES]
    return {"percentiles": dict(zip(names, quantiles, strict=True)), "lowest": lowest}


def _dropped_details(
    origins: Origins, dropped: Mapping[int, str]
) -> dict[str, list[dict[str, Any]]]:
    """Return which samples were dropped and lost, under the names of their metrics."""
    found: dict[str, list[dict[str, Any]]] = {}
    for index, why in sorted(dropped.items()):
        name = "replay/dropped_samples" if why == MISALIGNED else "replay/lost_samples"
        found.setdefault(name, []).append(_words(origins[index]))
    return found
