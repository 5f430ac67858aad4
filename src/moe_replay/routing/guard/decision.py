"""Decide from the evidence of all ranks which samples, servers, ranks and layers are misaligned.

A step runs in this order::

    parts     = summarise(counts of a rank), gathered from all ranks
    baseline  = guard.baseline(parts)             same on every rank
    evidence  = judge(counts, baseline), gathered from all ranks
    verdict   = guard.decide(baseline, evidence)  same on every rank; again after a second look
    guard.accept(verdict)                         later steps remember this one
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from moe_replay.routing.guard.baseline import Baseline
from moe_replay.routing.guard.groups import group_faults
from moe_replay.routing.guard.places import MIN_EXPLAINED
from moe_replay.routing.guard.sample_tests import (
    ALL_TESTS,
    CERTAIN,
    STRICT,
    STRONG,
    SUSPECT_NATS,
    SampleTests,
)
from moe_replay.routing.guard.sums import ServerSums
from moe_replay.routing.guard.table import SampleEvidence, StepPart, StepTable
from moe_replay.routing.guard.verdict import (
    Fault,
    Finding,
    Owner,
    SecondLook,
    Status,
    StepRecord,
    Verdict,
)

ALPHA = 1e-4
"""False alarms a step, over all tests of all samples."""
MIN_RHO = 2.0
"""ln(k3 under replay / k3 with live routing) above which a suspect is misaligned; healthy samples
stay below 1.9."""
MAX_DRIFT_RHO = 1.0
"""Median rho up to which drift explains lost routes; where all routes were wrong it was 2 to 7."""
MAX_LOOKS = 8
"""Maximum suspects a step with only a weak sign; those with a strong sign are always looked at."""
_HISTORY_STEPS = 20

PLACE_CAUSES = (
    "token shift +1: the routes of the next row fit better; they came a row late, one was inserted before them",
    "token shift -1: the routes of the row before fit better; they came a row early, one was dropped before them",
    "layer shift +1: the routes of the next layer fit better; dense or MTP layers were counted on one side only",
    "layer shift -1: the routes of the layer before fit better; dense or MTP layers were counted on one side only",
    "expert-id wrap: ids above 255 were stored in 8 bits",
)
"""Cause if the routes at this entry of `PLACES` fit better."""
BETTER = "even a neighbour's routes fit better than the replayed ones: those are from further away, random, or of another sample"
"""Cause if they fit better, but are not the right ones either."""


class Guard:
    """Decides step by step, and remembers what is usual. Use one guard for one model and run."""

    def __init__(self, *, alpha: float = ALPHA) -> None:
        """Keep the false alarms of a step below ``alpha``."""
        self._alpha = alpha
        self._history: list[StepRecord] = []
        self._sums = ServerSums()

    def baseline(
        self, parts: Sequence[StepPart | None], *, versions: Mapping[int, int] | None = None
    ) -> Baseline:
        """Return the baseline that the samples of this step are compared with.

        ``parts`` come from all ranks, in rank order; ``versions`` maps samples to policy versions
        if a step trains several.
        """
        return Baseline.measure(StepTable.of(parts), versions=versions, history=self._history)

    def decide(
        self,
        baseline: Baseline,
        evidence: Sequence[SampleEvidence | None],
        *,
        gaps: Mapping[int, float] | None = None,
        owners: Mapping[int, Owner] | None = None,
        looks: Mapping[int, SecondLook] | None = None,
    ) -> Verdict:
        """Return the verdict; only `accept` remembers it.

        Args:
            baseline: of this step.
            evidence: of all ranks.
            gaps: sample -> mean k3 between engine and trainer, under replay. Omit it for routes of
                the trainer itself.
            owners: sample -> where it came from.
            looks: sample -> result of the second look. None: the first decision, which asks for
                looks at its `suspects`. An empty mapping: no look is possible, so a strong sign
                suffices.
        """
        owners = owners or {}
        table = baseline.table
        tests = SampleTests(baseline, evidence, gaps=gaps, history=self._history, alpha=self._alpha)
        findings = _findings(tests, owners, looks)
        lost = [finding.sample for finding in findings if finding.status is Status.LOST]
        # Drift does not count against a server.
        telling = tests.is_telling() & ~np.isin(table.sample_ids, lost)
        sums = self._sums.after(table.sample_ids, telling, owners)
        margins, _ = tests.best((*CERTAIN, *STRONG))
        nearest = int(margins.argmax())
        return Verdict(
            findings=findings,
            faults=(
                *group_faults(baseline, tests.stray, tests.apart, owners, alpha=self._alpha),
                *sums.faults(self._alpha),
            ),
            sample_ids=table.sample_ids,
            agreement=table.agreement,
            margin_nats=float(margins[nearest]),
            margin_sample=int(table.sample_ids[nearest]),
            record=replace(baseline.record, stray=tests.record_stray),
            sums=sums.to_plain(),
        )

    def accept(self, verdict: Verdict) -> None:
        """Remember an accepted step: its record, and the signs of each server."""
        self._history = [*self._history, verdict.record][-_HISTORY_STEPS:]
        self._sums = ServerSums.from_plain(verdict.sums)

    def to_plain(self) -> dict[str, Any]:
        """Return everything that the guard remembers, as plain JSON."""
        steps = [record.to_plain() for record in self._history]
        return {"history": steps, "sums": self._sums.to_plain()}

    def restore(self, plain: Mapping[str, Any]) -> None:
        """Restore the memory from `to_plain`."""
        self._history = [StepRecord.from_plain(step) for step in plain["history"]]
        self._sums = ServerSums.from_plain(plain["sums"])


def drift_rho(fault: Fault, rho: Mapping[int, float]) -> float | None:
    """Return the median rho of a fault's samples where it says that drift explains the fault.

    Wrong routes raise the engine gap under replay alone. Where engine and trainer are far apart,
    with or without replay, rho is near 0. ``rho`` is by sample id, of as many as were scored twice.
    """
    known = [rho[sample] for sample in fault.samples or rho if sample in rho]
    if not fault.may_be_drift or not known:
        return None
    middle = float(np.median(known))
    return middle if middle <= MAX_DRIFT_RHO else None


def _findings(
    tests: SampleTests, owners: Mapping[int, Owner], looks: Mapping[int, SecondLook] | None
) -> tuple[Finding, ...]:
    samples = tests.baseline.table.sample_ids
    certain, certain_test = tests.best(CERTAIN)
    strong, strong_test = tests.best(STRONG)
    weak, weak_test = tests.best(STRICT)
    found: list[tuple[float, Finding]] = []
    for entry in np.flatnonzero((certain > 0) | (strong > 0) | tests.asks_for_a_look()).tolist():
        number = int(samples[entry])
        look = (looks or {}).get(number)
        is_strong = bool(strong[entry] > 0)
        row = int(strong_test[entry] if is_strong else weak_test[entry])
        if certain[entry] > 0:
            status, row = Status.MISALIGNED, int(certain_test[entry])
        elif looks is None:
            status = Status.SUSPECT
        elif _is_convicted(look, tests, int(strong_test[entry]), is_strong, bool(weak[entry] > 0)):
            status = Status.MISALIGNED
        elif is_strong:
            status = Status.LOST
        else:
            continue
        finding = _finding(tests, row, entry, status, look, owners.get(number, Owner()))
        found.append((max(float(certain[entry]), float(strong[entry])), finding))
    stray_nats = tests.nats[ALL_TESTS.index("strict stray rows")]
    scattered = set(samples[stray_nats > SUSPECT_NATS].tolist())
    kept, num_weak = [], 0
    for margin, finding in sorted(found, key=lambda pair: -pair[0]):
        # A fault with scattered rows shows in all of its samples or none: look at all.
        is_weak = margin <= 0 and finding.status is Status.SUSPECT
        is_weak = is_weak and finding.sample not in scattered
        num_weak += is_weak
        if not is_weak or num_weak <= MAX_LOOKS:
            kept.append(finding)
    return tuple(kept)


def _is_convicted(
    look: SecondLook | None, tests: SampleTests, row: int, is_strong: bool, is_weak: bool
) -> bool:
    """Tell whether a second look proves a sample misaligned; ``row`` is its strongest strong test.

    Wrong routes raise the gap under replay alone. Routes of other weights fit some place by chance,
    more than independent slots would: they share its popular experts. So a place proves nothing of
    a sample that lost everything and is as far from the engine's without replay.
    """
    if look is None or look.rho is None:
        is_apart, is_drift = is_strong, False
    else:
        is_apart = look.rho > MIN_RHO and (is_strong or is_weak)
        is_drift = look.rho < MIN_RHO / 2 and ALL_TESTS[row] == "lost sample"
    needed = float(tests.thresholds[ALL_TESTS.index("paired sample")])
    return is_apart or (look is not None and look.nats > needed and not is_drift)


def _finding(
    tests: SampleTests,
    row: int,
    entry: int,
    status: Status,
    look: SecondLook | None,
    owner: Owner,
) -> Finding:
    place, layer = int(tests.place[row, entry]), int(tests.layer[row, entry])
    cause, is_found = _cause(tests, row, entry), False
    if place >= 0:
        is_found = bool(tests.explained[row, entry] >= MIN_EXPLAINED)
        cause = PLACE_CAUSES[place] if is_found else BETTER
    if look is not None and (look.place or (look.cause and not is_found)):
        cause = look.place or look.cause or cause
    return Finding(
        sample=int(tests.baseline.table.sample_ids[entry]),
        status=status,
        test=ALL_TESTS[row],
        nats=float(tests.with_gap[row, entry]),
        threshold=float(tests.thresholds[row]),
        cause=cause,
        layer=layer if layer >= 0 else None,
        first=int(tests.first[row, entry]),
        last=int(tests.last[row, entry]),
        agreement=float(tests.baseline.table.agreement[entry]),
        owner=owner,
        gap_nats=float(tests.gap[entry]),
        rho=look.rho if look is not None else None,
    )


def _cause(tests: SampleTests, row: int, entry: int) -> str:
    test = ALL_TESTS[row]
    if test == "equal rows":
        rows = int(tests.last[row, entry] - tests.first[row, entry]) + 1
        return f"{rows} consecutive rows have the same route, which their routers do not choose: a stale part of the engine's buffer"
    if test.endswith("stray rows"):
        return f"{int(tests.stray[entry])} rows, scattered over the sample, have routes of other tokens"
    if test.startswith("lost"):
        return (
            "the routes fit their rows hardly better than those of any other row of the sample: they are random, of another "
            "sample, or from other weights"
        )
    return "the routes fit their rows clearly worse than those of the usual sample do"
