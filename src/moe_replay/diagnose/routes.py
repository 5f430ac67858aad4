"""Whether recorded routes belong to their tokens, judged sequence by sequence as they stream by.

The guard compares them with the trainer's own choice in a pass that replays nothing: wrong routes
disturb no later layer there. Traces wait compressed in a temporary file for a closer look.

In: Measured sequences. Out: the guard's verdict, and coverage.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moe_replay.diagnose.measured import Measured
from moe_replay.routing import RoutingTrace, decode_trace, encode_trace
from moe_replay.routing.guard import (
    Finding,
    Guard,
    OverlapCounts,
    Owner,
    RouteRows,
    Status,
    Verdict,
    count_overlaps,
    drift_rho,
    look_closer,
)
from moe_replay.routing.guard.check import judge_counts

_EXPLAINED = 16
"""Misaligned samples whose cause is searched in all of their rows."""
_LOOK_BYTES = 1 << 29
"""Ids that are looked at together, in bytes of a trace: those of the suspects come first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsSeen:
    """How many rows a diagnosis is about."""

    compared: int = 0
    """Rows with a recorded and a live route."""
    unrecorded: int = 0
    """Rows that ran in the engine and came without a route."""
    without_routes: int = 0
    """Sequences of which no row came with a route."""

    @property
    def coverage(self) -> float:
        """Share of the rows that could be compared; 0 without rows."""
        total = self.compared + self.unrecorded
        return self.compared / total if total else 0.0


class RouteJudge:
    """Counts what each sequence shares with its routes; `verdict` judges all of them.

    `close` removes its temporary file.
    """

    def __init__(self) -> None:
        self._counts: list[OverlapCounts] = []
        self._owners: dict[int, Owner] = {}
        self._places: dict[int, tuple[int, int, int]] = {}
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        self.names: list[str] = []
        """Names of the sequences; a finding's sample is an index of these."""
        self.rows = RowsSeen()
        """Rows so far."""

    def add(self, measured: Measured) -> None:
        """Count one sequence."""
        number = len(self.names)
        self.names.append(measured.name)
        self._owners[number] = Owner(
            server=measured.server or None,
            policy_version=measured.policy_version,
            prompt=measured.prompt,
        )
        recorded, live = measured.recorded, measured.live
        if live is None:
            return
        # An engine never runs the last token.
        could = len(measured.token_ids) - 1
        held = 0 if recorded is None else int((recorded.valid & live.valid).sum())
        self.rows = RowsSeen(
            compared=self.rows.compared + held,
            unrecorded=self.rows.unrecorded + max(could - held, 0),
            without_routes=self.rows.without_routes + (held == 0),
        )
        if recorded is None or not held:
            return
        rows = _rows_of([(number, recorded, live)])
        self._counts.append(
            count_overlaps(
                rows.expert_ids,
                rows.live_ids,
                valid=rows.valid,
                sample=rows.sample,
                position=rows.position,
                layers=rows.layers,
                num_experts=rows.num_experts,
            )
        )
        frames = encode_trace(recorded), encode_trace(live)
        self._places[number] = self._file.seek(0, 2), len(frames[0]), len(frames[1])
        for frame in frames:
            self._file.write(frame)

    def verdict(self, *, gaps: Mapping[int, float], rhos: Mapping[int, float]) -> Verdict | None:
        """Return the guard's verdict over all sequences; None where no row could be compared.

        ``gaps`` are the mean k3 of sequences under replay, ``rhos`` their ln(k3 under replay / k3
        live), by number.
        """
        if not self._counts:
            return None
        judged = {int(number) for part in self._counts for number in part.sample_ids}
        # A gap is evidence beside that of others, so all have one or none.
        known = {number: gaps[number] for number in judged & gaps.keys()}
        verdict = judge_counts(
            self._counts,
            self._look,
            guard=Guard(),
            gaps=known if len(known) == len(judged) else None,
            owners=self._owners,
            rhos=rhos,
        )
        # Where both sides have drifted apart, or hold other weights, replay does not raise the gap.
        return verdict.without(
            {
                (fault.kind, fault.name)
                for fault in verdict.faults
                if drift_rho(fault, rhos) is not None
            }
        )

    def explained(self, verdict: Verdict) -> tuple[str, Verdict]:
        """Return what explains all rows and layers of the samples, and the verdict with it.

        The guard looks where its sign was, in a window or a layer. Here all of a sample is looked
        at too, since a fault of all layers may look like another one in each of them. The words are
        those of the longest misaligned sample where groups of samples are misaligned, and else
        empty.
        """
        numbers = [finding.sample for finding in verdict.misaligned[:_EXPLAINED]]
        if verdict.faults:
            # A sequence is a part of its own.
            rows = {int(part.sample_ids[0]): len(part.own) for part in self._counts}
            everyone = [finding.sample for finding in verdict.misaligned] or list(rows)
            numbers = [max(everyone, key=lambda number: rows[number])]
        if not numbers:
            return "", verdict
        whole = [
            Finding(
                sample=number,
                status=Status.SUSPECT,
                test="",
                nats=0.0,
                threshold=0.0,
                cause="",
                layer=None,
                first=0,
                last=2**31 - 1,
                agreement=0.0,
                owner=Owner(),
            )
            for number in numbers
        ]
        # If all samples are wrong, no healthy one is left to compare with.
        usual = (
            verdict.record.information
            if not verdict.faults
            else max(verdict.record.information, 0.5)
        )
        looks = look_closer(self._look(numbers), whole, usual_information=usual)
        places = {number: look.place for number, look in looks.items() if look.place}
        if verdict.faults:
            return places.get(numbers[0], ""), verdict
        findings = tuple(
            replace(finding, cause=places.get(finding.sample, finding.cause))
            for finding in verdict.findings
        )
        return "", replace(verdict, findings=findings)

    def close(self) -> None:
        """Remove the temporary file. Calling it twice is allowed."""
        self._file.close()

    def _look(self, suspects: Sequence[int]) -> RouteRows:
        """Return the rows of suspects and, as far as there is room, those of other sequences."""
        chosen, size = [], 0
        for number in [*suspects, *(n for n in self._places if n not in suspects)]:
            pair = self._read(number)
            size += sum(trace.expert_ids.nbytes for trace in pair)
            if chosen and size > _LOOK_BYTES:
                break
            chosen.append((number, *pair))
        return _rows_of(chosen)

    def _read(self, number: int) -> tuple[RoutingTrace, RoutingTrace]:
        start, first, second = self._places[number]
        self._file.seek(start)
        held = self._file.read(first + second)
        return decode_trace(held[:first]), decode_trace(held[first:])


def _rows_of(traces: Sequence[tuple[int, RoutingTrace, RoutingTrace]]) -> RouteRows:
    first = traces[0][1]
    lengths = [len(recorded) for _, recorded, _ in traces]
    return RouteRows(
        expert_ids=np.concatenate([recorded.expert_ids for _, recorded, _ in traces]),
        live_ids=np.concatenate([live.expert_ids for _, _, live in traces]),
        valid=np.concatenate([recorded.valid & live.valid for _, recorded, live in traces]),
        sample=np.repeat([number for number, _, _ in traces], lengths),
        position=np.concatenate([np.arange(length) for length in lengths]),
        layers=first.layers,
        num_experts=first.num_experts,
    )
