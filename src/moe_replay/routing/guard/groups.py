"""Faults of a step, a layer, a rank or a server: the same two tests on sums over many samples.

If all samples have the same fault, it moves the median that each is compared with. So the median
itself is tested: by the paired test, which needs no comparison, and against a floor far below what
drift leaves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from moe_replay.routing.guard.baseline import Baseline
from moe_replay.routing.guard.counts import PLACES
from moe_replay.routing.guard.places import RouteRows, look_closer
from moe_replay.routing.guard.statistics import shortfall_nats
from moe_replay.routing.guard.verdict import Fault, Finding, Owner, Status, Verdict

if TYPE_CHECKING:
    from jaxtyping import Float64, Int64

FLOOR = 0.2
"""Minimum share of the information that the median sample keeps under any drift."""
MIN_ROOM = 0.1
"""Minimum share of the slots above chance for a statement about information."""
MAX_FLOOR_AGREEMENT = 0.75
"""Agreement above which nothing is said about information: in repetitive text, chance is as
high."""
MAX_STRAY = 0.03
"""Share of stray rows above which a group is wrong; the strongest drift left 0.2 % of them."""
_KINDS = len(PLACES) + 3
_ROWS_AS_ONE = 3.0  # rows of a burst of drift
_MIN_SAMPLES = 3  # of a group, for a statement about information
_MIN_SLOTS = 200  # of a median that is compared with the floor
_NOWHERE = "the routes fit their rows hardly better than those of any other row"


def group_faults(
    baseline: Baseline,
    stray: Int64[np.ndarray, " samples"],
    apart: Float64[np.ndarray, " samples"],
    owners: Mapping[int, Owner],
    *,
    alpha: float,
) -> tuple[Fault, ...]:
    """Return the faults of the step, layers, ranks and servers.

    ``stray``: rows of each sample that fit nowhere. ``apart``: share of its independent rows, so
    that one long text in a loop does not dominate its group.
    """
    return (
        *_step_faults(baseline, stray, apart, alpha),
        *_layer_faults(baseline, apart, alpha),
        *_rank_faults(baseline, apart, alpha),
        *_server_faults(baseline, stray, apart, owners, alpha),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Group:
    """Samples that are tested together; each test yields a fault if its sign suffices."""

    kind: str
    name: str
    baseline: Baseline
    threshold: float
    effect: int = 0
    """Entry of `Baseline.effects`: 0 over all layers, 1 in a single layer."""
    samples: tuple[int, ...] = ()

    def fault(self, cause: str, nats: float, *, may_be_drift: bool = True) -> Iterator[Fault]:
        if nats > self.threshold:
            yield Fault(
                kind=self.kind,
                name=self.name,
                cause=cause,
                nats=nats,
                threshold=self.threshold,
                samples=self.samples,
                may_be_drift=may_be_drift,
            )

    def paired(
        self, nearer: Float64[np.ndarray, " places"], farther: Float64[np.ndarray, " places"]
    ) -> Iterator[Fault]:
        """Test whether routes at another place fit the group's rows better than their own."""
        effect = np.array([effects[self.effect] for effects in self.baseline.effects[1:]])
        nats = shortfall_nats(farther, nearer + farther, 0.5, effect)
        best = int(nats.argmax())
        cause = f"the routes at '{PLACES[best]}' fit better than the replayed ones"
        return self.fault(cause, float(nats[best]), may_be_drift=False)

    def strewn(
        self, stray: Int64[np.ndarray, " samples"], num_rows: Int64[np.ndarray, " samples"]
    ) -> Iterator[Fault]:
        """Test whether more rows fit nowhere than any drift explains."""
        rows, count = float(num_rows.sum()), float(stray.sum())
        nats = shortfall_nats(rows - count, rows, 1 - MAX_STRAY, _ROWS_AS_ONE)
        cause = f"{count / max(rows, 1):.0%} of the rows, scattered over the samples, have routes of other tokens"
        return self.fault(cause, float(nats))

    def lost(
        self,
        own: np.ndarray,
        chance: np.ndarray,
        slots: np.ndarray,
        kappa: Float64[np.ndarray, "samples layers"],
    ) -> Iterator[Fault]:
        """Test whether most samples of the group keep far less than the usual sample.

        Most, because single samples may lose their routes to drift; those are judged one by one.
        """
        due = (chance + self.baseline.tolerance * kappa * (slots - chance)).sum(axis=1)
        below = own.sum(axis=1) < due
        if len(own) >= _MIN_SAMPLES and below.mean() > 0.5:
            cause = f"{_NOWHERE} of the sample, in {int(below.sum())} of its {len(own)} samples, unlike those of the others"
            yield from self.fault(cause, self._shortfall(own, due, slots))

    def at_floor(
        self, own: np.ndarray, chance: np.ndarray, slots: np.ndarray, kept: float, cause: str
    ) -> Iterator[Fault]:
        """Test whether the samples keep less than `FLOOR` of the information, as the median does.

        ``kept`` is the median's share; ``cause`` names it at ``{kept}``.
        """
        is_high = own.sum() >= MAX_FLOOR_AGREEMENT * slots.sum()
        if kept < FLOOR and slots.sum() >= _MIN_SLOTS and not is_high:
            nats = self._shortfall(own, chance + FLOOR * (slots - chance), slots)
            yield from self.fault(cause.format(kept=f"{max(kept, 0):.0%}"), nats)

    def stretches(
        self, stretches: Float64[np.ndarray, "quantities stretches"], share: float
    ) -> Iterator[Fault]:
        """Test every stretch of all samples, such as their end, and report the worst.

        ``share`` of the rows are independent.
        """
        num = stretches.shape[1]
        total = np.concatenate(
            [np.zeros((len(stretches), 1)), np.cumsum(stretches, axis=1)], axis=1
        )
        # 1, 2, 4 and 8 stretches in a row, each half overlapping the last.
        first, end = np.array(
            [
                (at, at + width)
                for width in (1, 2, 4, 8)
                for at in range(0, num - width + 1, -(-width // 2))
            ]
        ).T
        sums = total[:, end] - total[:, first]
        slots, own, chance = sums[:3]
        nearer, farther = sums[3:].reshape(2, len(PLACES), -1)
        effect = np.array([effects[0] for effects in self.baseline.effects])
        paired = share * shortfall_nats(farther, nearer + farther, 0.5, effect[1:, None])
        room = slots - chance
        due = (chance + FLOOR * room) / np.maximum(slots, 1.0)
        kept = shortfall_nats(own, slots, due, effect[0])
        silent = (room <= MIN_ROOM * slots) | (own >= MAX_FLOOR_AGREEMENT * slots)
        kept[silent | (slots < _MIN_SLOTS)] = 0.0
        best = np.maximum(paired.max(axis=0), kept)
        at = int(best.argmax())
        priced = replace(self, threshold=self.threshold + math.log(len(first)))
        is_paired = bool(paired[:, at].max() > priced.threshold)
        place = PLACES[int(paired[:, at].argmax())]
        fits = f"the routes at '{place}' fit better than the replayed ones"
        cause = (
            f"from {first[at] / num:.0%} to {end[at] / num:.0%} of the rows of each sample, "
            f"{fits if is_paired else _NOWHERE}"
        )
        return priced.fault(cause, float(best[at]), may_be_drift=not is_paired)

    def _shortfall(self, own: np.ndarray, due: np.ndarray, slots: np.ndarray) -> float:
        total = float(slots.sum())
        share = float(due.sum()) / max(total, 1.0)
        effect = self.baseline.effects[0][self.effect]
        return float(shortfall_nats(float(own.sum()), total, share, effect))


def _threshold(num_groups: int, alpha: float) -> float:
    return math.log(2 * _KINDS * num_groups / alpha)


def _share(
    apart: Float64[np.ndarray, " samples"], num_rows: Int64[np.ndarray, " samples"]
) -> float:
    """Return the share of independent rows over all samples."""
    return float((apart * num_rows).sum() / max(num_rows.sum(), 1))


def _step_faults(
    baseline: Baseline,
    stray: Int64[np.ndarray, " samples"],
    apart: Float64[np.ndarray, " samples"],
    alpha: float,
) -> Iterator[Fault]:
    table = baseline.table
    step = _Group(kind="step", name="", baseline=baseline, threshold=_threshold(1, alpha))
    yield from step.strewn(stray, table.num_rows)
    stretches = np.sum([part.stretches for part in table.parts], axis=0)
    yield from step.stretches(stretches, _share(apart, table.num_rows))
    yield from step.paired(table.nearer @ apart, table.farther @ apart)
    room = 1 - table.chance.sum(axis=1) / np.maximum(table.slots.sum(axis=1), 1)
    if np.median(room) > MIN_ROOM:
        cause = f"no sample's routes carry information: {_NOWHERE}, and the median sample keeps {{kept}} of it"
        kept = float(np.median(table.information()))
        yield from step.at_floor(table.own, table.chance, table.slots, kept, cause)


def _layer_faults(
    baseline: Baseline, apart: Float64[np.ndarray, " samples"], alpha: float
) -> Iterator[Fault]:
    table = baseline.table
    share = _share(apart, table.num_rows)
    if np.median(table.information()) < FLOOR:
        return  # the step's fault, not a layer's
    information = table.layer_information()
    threshold = _threshold(len(table.layers), alpha)
    cause = (
        f"{_NOWHERE} of the sample, and the median sample keeps {{kept}} of the information: the engine did not capture "
        "this layer, or captured another"
    )
    for entry, name in enumerate(map(str, table.layers)):
        layer = _Group(kind="layer", name=name, baseline=baseline, threshold=threshold, effect=1)
        yield from layer.paired(
            share * table.layer_nearer[:, entry], share * table.layer_farther[:, entry]
        )
        known = np.isfinite(information[:, entry])
        own, chance, slots = (v[:, [entry]] for v in (table.own, table.chance, table.slots))
        if not known.any() or 1 - chance.sum() / max(slots.sum(), 1) <= MIN_ROOM:
            continue
        # A collapsed router whose last expert is a near tie: all rows share the same slots, but not
        # all slots.
        if table.alike[entry] <= 0.5:
            kept = float(np.median(information[known, entry]))
            yield from layer.at_floor(own, chance, slots, kept, cause)


def _rank_faults(
    baseline: Baseline, apart: Float64[np.ndarray, " samples"], alpha: float
) -> Iterator[Fault]:
    """Yield the faults of ranks, also of those whose rows keep no information in any sample.

    Then no sample stands out: contiguous routes under zigzag context parallelism are wrong for half
    the rows of one rank and all rows of the other, and the median over both keeps a quarter.
    """
    table = baseline.table
    if len(table.parts) < 2:
        return
    threshold = _threshold(len(table.parts), alpha)
    cause = (
        f"{_NOWHERE} of the sample, and the median sample keeps {{kept}} of the information in the rows and layers of this "
        "rank: its routes were cut for other rows than its tokens"
    )
    for number, part in zip(table.ranks, table.parts, strict=True):
        rank = _Group(
            kind="rank",
            name=str(number),
            baseline=baseline,
            threshold=threshold,
            samples=tuple(part.sample_ids.tolist()),
        )
        at = np.searchsorted(table.sample_ids, part.sample_ids)
        yield from rank.stretches(part.stretches, _share(apart[at], part.num_rows.astype(np.int64)))
        yield from rank.paired(part.nearer @ apart[at], part.farther @ apart[at])
        kappa = baseline.kappa[baseline.version_entry[at]]
        kappa = kappa[:, np.searchsorted(table.layers, part.layers)]
        slots = np.repeat(part.num_rows[:, None] * float(part.topk), len(part.layers), axis=1)
        lost = tuple(rank.lost(part.own, part.chance, slots, kappa))
        yield from lost
        room = slots - part.chance
        is_step = np.median(table.information()) < FLOOR
        if lost or is_step or room.sum() <= MIN_ROOM * slots.sum():
            continue
        information = (part.own - part.chance).sum(axis=1) / np.maximum(room.sum(axis=1), 1e-9)
        kept = float(np.median(information))
        yield from rank.at_floor(part.own, part.chance, slots, kept, cause)


def _server_faults(
    baseline: Baseline,
    stray: Int64[np.ndarray, " samples"],
    apart: Float64[np.ndarray, " samples"],
    owners: Mapping[int, Owner],
    alpha: float,
) -> Iterator[Fault]:
    table = baseline.table
    of = [owners.get(int(number), Owner()).servers for number in table.sample_ids]
    servers = sorted({server for each in of for server in each})
    if len(servers) < 2:
        return
    for name in servers:
        at = np.array([name in each for each in of])
        server = _Group(
            kind="server",
            name=name,
            baseline=baseline,
            threshold=_threshold(len(servers), alpha),
            samples=tuple(table.sample_ids[at].tolist()),
        )
        yield from server.paired(table.nearer[:, at] @ apart[at], table.farther[:, at] @ apart[at])
        yield from server.strewn(stray[at], table.num_rows[at])
        kappa = baseline.kappa[baseline.version_entry[at]]
        yield from server.lost(table.own[at], table.chance[at], table.slots[at], kappa)


def explain_faults(verdict: Verdict, rows: RouteRows, *, usual_information: float) -> Verdict:
    """Return the verdict with causes of its faults, found in a long sample of low agreement.

    If every sample is wrong, no usual one exists to compare with, so half of full information is
    required.
    """
    if not verdict.faults:
        return verdict
    worst = _telling_sample(verdict, rows)
    faults = []
    for fault in verdict.faults:
        suspect = Finding(
            sample=worst,
            status=Status.SUSPECT,
            test="",
            nats=0.0,
            threshold=0.0,
            cause="",
            layer=int(fault.name) if fault.kind == "layer" else None,
            first=0,
            last=2**31 - 1,
            agreement=0.0,
            owner=Owner(),
        )
        looked = look_closer(rows, [suspect], usual_information=max(usual_information, 0.5))
        said = next((look.place or look.cause for look in looked.values()), None)
        words = f"{fault.cause}; in sample {worst}: {said}" if said else fault.cause
        faults.append(replace(fault, cause=words))
    return replace(verdict, faults=tuple(faults))


def _telling_sample(verdict: Verdict, rows: RouteRows) -> int:
    """Return the sample with the lowest agreement among those of at least half the most rows."""
    numbers, held = np.unique(rows.sample[rows.valid], return_counts=True)
    known = np.isin(verdict.sample_ids, numbers[2 * held >= held.max()])
    return int(verdict.sample_ids[np.where(known, verdict.agreement, np.inf).argmin()])
