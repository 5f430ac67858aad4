"""The guard between TRL's passes and its optimizer: routes are judged before anything is learned.

Every process counts its own rows, all measure one baseline and decide together, so all stop or none
does.

In: rows and gaps of a pass. Out: metrics, or `MisalignmentError` on every process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moe_replay.errors import MisalignmentError
from moe_replay.routing.guard import (
    Baseline,
    Guard,
    Owner,
    RouteRows,
    SampleEvidence,
    SecondLook,
    Verdict,
    drift_rho,
    judge,
    look_closer,
    summarise,
    with_rho,
)
from moe_replay.routing.guard.sample_tests import CERTAIN
from moe_replay.trl.watch import Gather, PassWatch, counts_of

_logger = logging.getLogger(__name__)
_NAMED = 4
"""Misaligned samples whose cause is searched: as many as a message spells out."""
_MAX_FALL = 0.1
"""How much of its agreement a sample may lose in the update, under unmoved weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What the guard found of a pass that may be learned from."""

    metrics: Mapping[str, float]
    """Figures for the log; empty when nothing was replayed."""
    agreement: Mapping[int, float]
    """Number of a sample -> its agreement, of all processes."""
    drifted: frozenset[tuple[str, str]]
    """Groups whose routes drift has left no information."""

    def joined(self, other: Judged) -> Judged:
        """Return this and what was found of other samples."""
        return replace(
            self,
            agreement={**self.agreement, **other.agreement},
            drifted=self.drifted | other.drifted,
        )


def judge_first(
    guard: Guard,
    watch: PassWatch,
    *,
    prompts: Mapping[int, int],
    live_gaps: Callable[[], Mapping[int, float]],
    gather: Gather,
    where: str,
) -> Judged:
    """Judge routes by the first pass under them, by the weights that chose them; collective.

    ``prompts`` says which prompt each sample of this process is of. ``live_gaps`` scores them
    again with live routing, and returns their mean k3; all processes call it, and only when
    something looks wrong.

    Raises:
        MisalignmentError: on every process, when routes are not those of their tokens.
    """
    found = _measure(guard, watch, gather)
    if found is None:
        return Judged(metrics={}, agreement={}, drifted=frozenset())
    rows, baseline, evidence = found
    gaps = _joined(gather(watch.mean_gaps()))
    owners = {number: Owner(prompt=at) for number, at in _joined(gather(prompts)).items()}
    verdict = guard.decide(baseline, evidence, gaps=gaps, owners=owners)
    num_suspects = len(verdict.suspects)
    drifted: frozenset[tuple[str, str]] = frozenset()
    if verdict.findings or verdict.faults:
        rho = _rho(watch.mean_gaps(), live_gaps(), gather)
        looked_at = (*verdict.suspects, *verdict.misaligned[:_NAMED])
        looks: dict[int, SecondLook] = {}
        if rows is not None:
            mine = [finding for finding in looked_at if finding.sample in prompts]
            effect = max(effect for effect, _ in baseline.effects[1:])
            looks = look_closer(
                rows, mine, usual_information=baseline.record.information, effect=effect
            )
        looks = _joined(gather(looks))
        for finding in looked_at:
            if finding.sample in rho:
                look = looks.get(finding.sample, SecondLook())
                looks[finding.sample] = replace(look, rho=rho[finding.sample])
        verdict = guard.decide(baseline, evidence, gaps=gaps, owners=owners, looks=looks)
        drifted = _drifted(verdict, rho)
    verdict = verdict.without(drifted)
    if not verdict.is_clean:
        raise MisalignmentError(verdict.message(where))
    guard.accept(verdict)
    return _judged(verdict, num_suspects, drifted)


def judge_again(
    guard: Guard,
    watch: PassWatch,
    *,
    before: Judged | None,
    weights_moved: bool,
    gather: Gather,
    where: str,
) -> Judged:
    """Judge routes once more before the optimizer moves; collective.

    What is misaligned here was mixed up between two passes of the trainer: ``before`` is what the
    pass before found of the same samples, if there was one. Once ``weights_moved`` since the routes
    were recorded, only a place that fits better counts as a sign.

    Raises:
        MisalignmentError: on every process.
    """
    found = _measure(guard, watch, gather)
    if found is None:
        return Judged(metrics={}, agreement={}, drifted=frozenset())
    _, baseline, evidence = found
    verdict = guard.decide(baseline, evidence, looks={})
    known = {} if before is None else before.agreement
    verdict = replace(
        verdict,
        findings=tuple(
            finding
            for finding in verdict.misaligned
            if finding.test in CERTAIN
            or (
                not weights_moved and finding.agreement < known.get(finding.sample, 1.0) - _MAX_FALL
            )
        ),
        faults=tuple(
            fault for fault in verdict.faults if not (weights_moved and fault.may_be_drift)
        ),
    )
    verdict = verdict.without(frozenset() if before is None else before.drifted)
    if not verdict.is_clean:
        raise MisalignmentError(verdict.message(where))
    return _judged(verdict, 0, frozenset())


def _measure(
    guard: Guard, watch: PassWatch, gather: Gather
) -> tuple[RouteRows | None, Baseline, list[SampleEvidence | None]] | None:
    """Return the rows of this process, and what all say of theirs; None when none has any."""
    rows = watch.rows()
    counts = None if rows is None else counts_of(rows)
    parts = gather(None if counts is None else summarise([counts]))
    if not any(part is not None for part in parts):
        return None
    baseline = guard.baseline(parts)
    return rows, baseline, gather(None if counts is None else judge(counts, baseline))


def _judged(verdict: Verdict, num_suspects: int, drifted: frozenset[tuple[str, str]]) -> Judged:
    if verdict.lost:
        _logger.warning(
            "%d of %d samples lost their routes to drift:\n%s",
            len(verdict.lost),
            len(verdict.sample_ids),
            verdict.summary(),
        )
    return Judged(
        metrics={
            "replay/guard_margin_nats": verdict.margin_nats,
            "replay/suspects": float(num_suspects),
            "replay/lost_samples": float(len(verdict.lost)),
        },
        agreement=dict(zip(verdict.sample_ids.tolist(), verdict.agreement.tolist(), strict=True)),
        drifted=drifted,
    )


def _rho(
    replayed: Mapping[int, float], live: Mapping[int, float], gather: Gather
) -> dict[int, float]:
    """Return ln(k3 under replay / k3 live) of the samples of all processes; collective."""
    mine: dict[int, float] = {}
    for number, gap in replayed.items():
        if number in live:
            look = with_rho(SecondLook(), replayed_k3=gap, live_k3=live[number])
            assert look.rho is not None
            mine[number] = look.rho
    return _joined(gather(mine))


def _drifted(verdict: Verdict, rho: Mapping[int, float]) -> frozenset[tuple[str, str]]:
    """Return the groups whose samples are as far from the engine without replay."""
    found = set()
    for fault in verdict.faults:
        if drift_rho(fault, rho) is not None:
            found.add((fault.kind, fault.name))
            _logger.warning(
                "%s. The engine gap of these samples is as large without replay, so engine and "
                "trainer have drifted apart, and the routes are not at fault",
                fault,
            )
    return frozenset(found)


def _joined(parts: Sequence[Mapping[int, Any]]) -> dict[int, Any]:
    return {number: value for part in parts for number, value in part.items()}
