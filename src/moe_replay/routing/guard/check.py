"""The guard as one call on plain arrays, for any trainer: do these routes belong to these rows?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_replay.errors import MisalignmentError
from moe_replay.routing.guard.counts import OverlapCounts, count_overlaps
from moe_replay.routing.guard.decision import Guard
from moe_replay.routing.guard.evidence import judge
from moe_replay.routing.guard.given import check_signs, given_rows
from moe_replay.routing.guard.groups import explain_faults
from moe_replay.routing.guard.places import RouteRows, look_closer
from moe_replay.routing.guard.summary import summarise
from moe_replay.routing.guard.table import join_evidence
from moe_replay.routing.guard.verdict import Fault, Finding, Owner, Status, Verdict

if TYPE_CHECKING:
    from jaxtyping import Int64

_LOOKED_AT = 16  # findings whose cause is searched


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RouteReport:
    """The result of `check_routes`."""

    misaligned: tuple[Finding, ...]
    """Samples whose routes do not belong to their rows, most certain first."""
    faults: tuple[Fault, ...]
    """Groups of samples that look wrong: the step, a layer, a server."""
    agreement: dict[int, float]
    """Sample -> share of its slots on which live and replayed routes agree."""
    verdict: Verdict | None
    """The guard's full answer; None if no row could be compared."""

    @property
    def is_clean(self) -> bool:
        """Whether nothing is misaligned."""
        return not self.misaligned and not self.faults

    def summary(self) -> str:
        """Describe the findings, or how close the nearest sample came to one."""
        broken = [finding for finding in self.misaligned if finding.test == "structure"]
        lines = [f"misaligned: {finding}" for finding in broken[:_LOOKED_AT]]
        if self.verdict is not None and (not broken or not self.verdict.is_clean):
            lines.append(self.verdict.summary())
        return "\n".join(lines) or "no row has a replayed route, so there is nothing to compare"

    def raise_if_misaligned(self, where: str = "check_routes") -> None:
        """Raise `MisalignmentError` with the findings unless `is_clean`.

        ``where`` names the step in the message.
        """
        if not self.is_clean:
            raise MisalignmentError(
                f"{where}: replayed routes do not belong to their rows ({len(self.misaligned)} of {len(self.agreement)} samples), "
                f"expected routes that fit their own rows best.\n{self.summary()}\nFix where the routes are captured, "
                "transported or laid out in the batch; training through them would train the wrong experts"
            )


def check_routes(
    expert_ids: Any,
    live_ids: Any,
    sample: Any,
    *,
    num_experts: int,
    position: Any = None,
    valid: Any = None,
    layers: Any = None,
    gaps: Mapping[int, float] | None = None,
    owners: Mapping[int, Owner] | None = None,
    guard: Guard | None = None,
) -> RouteReport:
    """Check that the replayed routes of one training step belong to their rows.

    Every row of every sample is evidence: pass all rows of all samples (32 or more), so that the
    usual sample is known. Accepts numpy arrays, torch tensors on any device, and nested lists.

    Args:
        expert_ids: ``[rows, layers, topk]``, the routes that are replayed (recorded by the engine).
        live_ids: ``[rows, layers, topk]``, the trainer's own top-k for the same rows, computed in
            the pass that replays.
        sample: ``[rows]``, id of the sample of each row; negative at padding.
        num_experts: experts a layer.
        position: ``[rows]``, position of each row in its sample. Default: rows of a sample are in
            order.
        valid: ``[rows]``, False where nothing is replayed, such as the last token. Default: all
            rows except padding.
        layers: index of each entry of the layer dim, for messages; 0 to 32,767, each once. Default:
            0, 1, 2, ...
        gaps: sample -> mean k3 between engine and trainer log-probabilities under replay: optional
            further evidence.
        owners: sample -> `Owner`: also judges servers, and names them in messages.
        guard: remembers the usual sample between steps; keep one for a run. Default: this step
            alone.

    Raises:
        TraceError: an argument is invalid, arrays do not fit each other, or live ids are not a
            top-k.

    Examples:
        >>> report = check_routes(recorded, live, sample, num_experts=128)
        >>> report.raise_if_misaligned(f"step {step}")
    """
    rows = given_rows(expert_ids, live_ids, sample, position, valid, layers, num_experts)
    check_signs(gaps, owners)
    return _report(rows, guard, gaps, owners or {})


def _report(
    rows: RouteRows,
    guard: Guard | None,
    gaps: Mapping[int, float] | None,
    owners: Mapping[int, Owner],
) -> RouteReport:
    broken = tuple(_broken(rows, owners))
    agreement = {finding.sample: 0.0 for finding in broken}
    intact = rows.valid & ~np.isin(rows.sample, list(agreement))
    if not intact.any():
        return RouteReport(misaligned=broken, faults=(), agreement=agreement, verdict=None)
    verdict = _judge(replace(rows, valid=intact), guard or Guard(), gaps, owners)
    agreement |= {
        int(number): float(share)
        for number, share in zip(verdict.sample_ids, verdict.agreement, strict=True)
    }
    if guard is not None and verdict.is_clean and not broken:
        guard.accept(verdict)
    return RouteReport(
        misaligned=(*broken, *verdict.misaligned),
        faults=verdict.faults,
        agreement=agreement,
        verdict=verdict,
    )


def _judge(
    rows: RouteRows,
    guard: Guard,
    gaps: Mapping[int, float] | None,
    owners: Mapping[int, Owner],
) -> Verdict:
    counts: OverlapCounts = count_overlaps(
        rows.expert_ids,
        rows.live_ids,
        valid=rows.valid,
        sample=rows.sample,
        position=rows.position,
        layers=rows.layers,
        num_experts=rows.num_experts,
    )
    return judge_counts([counts], lambda _: rows, guard=guard, gaps=gaps, owners=owners)


def judge_counts(
    counts: Sequence[OverlapCounts],
    rows_of: Callable[[Sequence[int]], RouteRows],
    *,
    guard: Guard,
    gaps: Mapping[int, float] | None = None,
    owners: Mapping[int, Owner] | None = None,
    rhos: Mapping[int, float] | None = None,
) -> Verdict:
    """Judge samples that were counted in several parts, and look closer at those that look wrong.

    Args:
        counts: each sample is in one of them.
        rows_of: returns the rows of given samples, and of others that they may be confused with.
        guard: its memory is not changed.
        gaps: as for `check_routes`.
        owners: as for `check_routes`.
        rhos: sample -> ln(k3 under replay / k3 with live routing), of samples scored both ways.
    """
    owners = owners or {}
    sample_ids = np.concatenate([part.sample_ids for part in counts])
    baseline = guard.baseline([summarise(counts)], versions=_versions(owners, sample_ids))
    evidence = [join_evidence([judge(part, baseline) for part in counts if len(part.own)])]
    first = guard.decide(baseline, evidence, gaps=gaps, owners=owners)
    usual = baseline.record.information
    suspects = first.findings[:_LOOKED_AT]
    looks = {}
    if suspects:
        rows = rows_of([finding.sample for finding in suspects])
        looks = look_closer(rows, suspects, usual_information=usual)
    for number, rho in (rhos or {}).items():
        if number in looks:
            looks[number] = replace(looks[number], rho=rho)
    verdict = guard.decide(baseline, evidence, gaps=gaps, owners=owners, looks=looks)
    if not verdict.faults:
        return verdict
    num_rows = np.concatenate([part.num_rows for part in counts])
    longest = int(sample_ids[int(num_rows.argmax())])
    return explain_faults(verdict, rows_of([longest]), usual_information=usual)


def _versions(
    owners: Mapping[int, Owner], sample_ids: Int64[np.ndarray, " samples"]
) -> dict[int, int] | None:
    known = {
        int(number): owner.policy_version
        for number in sample_ids
        if (owner := owners.get(int(number))) and owner.policy_version is not None
    }
    return known if len(known) == len(sample_ids) else None


def _broken(rows: RouteRows, owners: Mapping[int, Owner]) -> Iterator[Finding]:
    """Yield samples with rows that no router can choose: ids out of range, or duplicates."""
    replayed, sample, num_experts = rows.expert_ids, rows.sample, rows.num_experts
    ordered = np.sort(replayed.astype(np.int64), axis=2)
    outside = (ordered[..., 0] < 0) | (ordered[..., -1] >= num_experts)
    twice = (ordered[..., 1:] == ordered[..., :-1]).any(axis=2)
    wrong = outside | twice
    bad = rows.valid & wrong.any(axis=1)
    for number in np.unique(sample[bad]):
        at = np.flatnonzero(bad & (sample == number))
        held = replayed[at[0]][wrong[at[0]].argmax()].tolist()
        cause = f"{len(at)} rows hold 0 in every slot: they were never written"
        if replayed[at].any():
            cause = (
                f"{len(at)} rows hold ids like {held}, which no router chooses: outside 0..{num_experts - 1}, or "
                "duplicates"
            )
        yield Finding(
            sample=int(number),
            status=Status.MISALIGNED,
            test="structure",
            nats=float("inf"),
            threshold=0.0,
            cause=cause,
            layer=None,
            first=int(rows.position[at].min()),
            last=int(rows.position[at].max()),
            agreement=0.0,
            owner=owners.get(int(number), Owner()),
        )
