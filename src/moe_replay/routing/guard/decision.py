"""Decide from the evidence of all ranks which samples, servers, ranks and layers are misaligned.

A step runs in this order::

    parts     = summarise(counts of a rank), gathered from all ranks
    baseline  = guard.baseline(parts)             same on every rank
    evidence  = judge(counts, baseline), gathered from all ranks
    verdict   = guard.decide(baseline, evidence)  same on every rank; again after a second look
    guard.accept(verdict)                         later steps remember this one

In: Baseline, SampleEvidence, gaps, owners. Out: `Guard` and its `Verdict`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_replay.routing.guard.baseline import Baseline
from moe_replay.routing.guard.groups import group_faults
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
    Finding,
    Owner,
    SecondLook,
    Status,
    StepRecord,
    Verdict,
)

if TYPE_CHECKING:
    from jaxtyping import Float64

ALPHA = 1e-4
"""False alarms a step, over all tests of all samples."""
MIN_RHO = 2.0
"""ln(k3 under replay / k3 with live routing) above which a suspect is misaligned; healthy samples
stay below 1.9."""
MAX_LOOKS = 8
"""Maximum suspects a step with only a weak sign; those with a strong sign are always looked at."""
MIN_EXPLAINED = 0.5
"""Share of the usual information that routes at another place need to count as the right ones."""
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
        tests = SampleTests(
            baseline,
            evidence,
            gaps=gaps,
            history=self._history,
            alpha=self._alpha,
        )
        findings = self._findings(baseline, tests, owners, looks)
        lost = [finding.sample for finding in findings if finding.status is Status.LOST]
        # Drift does not count against a server.
        telling = tests.is_telling() & ~np.isin(baseline.table.sample_ids, lost)
        sums = self._sums.after(baseline.table.sample_ids, telling, owners)
        margins, _ = tests.best((*CERTAIN, *STRONG))
        nearest = int(margins.argmax())
        return Verdict(
            findings=findings,
            faults=(
                *group_faults(baseline, tests.stray, tests.apart, owners, alpha=self._alpha),
                *sums.faults(self._alpha),
            ),
            sample_ids=baseline.table.sample_ids,
            agreement=baseline.table.agreement,
            margin_nats=float(margins[nearest]),
            margin_sample=int(baseline.table.sample_ids[nearest]),
            record=_record(baseline, tests),
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

    def _findings(
        self,
        baseline: Baseline,
        tests: SampleTests,
        owners: Mapping[int, Owner],
        looks: Mapping[int, SecondLook] | None,
    ) -> tuple[Finding, ...]:
        certain, certain_test = tests.best(CERTAIN)
        strong, strong_test = tests.best(STRONG)
        weak, weak_test = tests.best(STRICT)
        asked = tests.asks_for_a_look()
        stray_nats = tests.nats[ALL_TESTS.index("strict stray rows")]
        scattered = set(baseline.table.sample_ids[stray_nats > SUSPECT_NATS].tolist())
        agreement = baseline.table.agreement
        # Nats that a search of places must show.
        threshold = float(tests.thresholds[ALL_TESTS.index("paired sample")])
        found: list[tuple[float, Finding]] = []
        for entry in np.flatnonzero((certain > 0) | (strong > 0) | asked).tolist():
            number = int(baseline.table.sample_ids[entry])
            look = (looks or {}).get(number)
            is_strong = bool(strong[entry] > 0)
            row = int(weak_test[entry])
            status: Status | None
            if certain[entry] > 0:
                status, row = Status.MISALIGNED, int(certain_test[entry])
            elif looks is None:
                status = Status.SUSPECT
            elif look is None:
                status = Status.MISALIGNED if is_strong else None
            elif (
                (
                    look.nats > threshold
                    and not _looks_like_drift(look, ALL_TESTS[int(strong_test[entry])])
                )
                or _is_apart(look, is_strong or bool(weak[entry] > 0))
                or (look.rho is None and is_strong)
            ):
                status = Status.MISALIGNED
            else:
                status = Status.LOST if is_strong else None
            if status is None:
                continue
            if (is_strong and status is not Status.MISALIGNED) or (
                is_strong and certain[entry] <= 0
            ):
                row = int(strong_test[entry])
            margin = max(float(certain[entry]), float(strong[entry]))
            finding = _finding(tests, row, entry, number, status, look, owners, agreement)
            found.append((margin, finding))
        found.sort(key=lambda pair: -pair[0])
        weak_looks = [
            pair
            for pair in found
            # A fault with scattered rows shows in all of its samples or none: look at all.
            if pair[0] <= 0 and pair[1].status is Status.SUSPECT and pair[1].sample not in scattered
        ]
        spared = {id(pair[1]) for pair in weak_looks[MAX_LOOKS:]}
        return tuple(finding for _, finding in found if id(finding) not in spared)


def _looks_like_drift(look: SecondLook, test: str) -> bool:
    """Tell whether a sample that lost everything is as far from the engine's without replay.

    Wrong routes raise the gap under replay alone. Routes of other weights fit some place by chance,
    more than independent slots would: they share its popular experts.
    """
    return test == "lost sample" and look.rho is not None and look.rho < MIN_RHO / 2


def _is_apart(look: SecondLook, overlap_is_low: bool) -> bool:
    return look.rho is not None and look.rho > MIN_RHO and overlap_is_low


def _finding(
    tests: SampleTests,
    row: int,
    entry: int,
    number: int,
    status: Status,
    look: SecondLook | None,
    owners: Mapping[int, Owner],
    agreement: Float64[np.ndarray, " samples"],
) -> Finding:
    place = int(tests.place[row, entry])
    layer = int(tests.layer[row, entry])
    cause, is_found = _cause(ALL_TESTS[row], tests, row, entry), False
    if place >= 0:
        is_found = bool(tests.explained[row, entry] >= MIN_EXPLAINED)
        cause = PLACE_CAUSES[place] if is_found else BETTER
    if look is not None and (look.place or (look.cause and not is_found)):
        cause = look.place or look.cause or cause
    return Finding(
        sample=number,
        status=status,
        test=ALL_TESTS[row],
        nats=float(tests.with_gap[row, entry]),
        threshold=float(tests.thresholds[row]),
        cause=cause,
        layer=layer if layer >= 0 else None,
        first=int(tests.first[row, entry]),
        last=int(tests.last[row, entry]),
        agreement=float(agreement[entry]),
        owner=owners.get(number, Owner()),
        gap_nats=float(tests.gap[entry]),
        rho=look.rho if look is not None else None,
    )


def _cause(test: str, tests: SampleTests, row: int, entry: int) -> str:
    rows = int(tests.last[row, entry] - tests.first[row, entry]) + 1
    if test == "equal rows":
        return f"{rows} consecutive rows have the same route, which their routers do not choose: a stale part of the engine's buffer"
    if test.endswith("stray rows"):
        return f"{int(tests.stray[entry])} rows, scattered over the sample, have routes of other tokens"
    if test.startswith("lost"):
        return (
            "the routes fit their rows hardly better than those of any other row of the sample: they are random, of another "
            "sample, or from other weights"
        )
    return "the routes fit their rows clearly worse than those of the usual sample do"


def _record(baseline: Baseline, tests: SampleTests) -> StepRecord:
    plain = baseline.record.to_plain()
    return StepRecord.from_plain({**plain, "stray": tests.record_stray})
