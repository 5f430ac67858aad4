"""Faults of a step, a layer, a rank or a server: the same two tests on sums over many samples.

If all samples have the same fault, it moves the median that each is compared with. So the median
itself is tested: by the paired test, which needs no comparison, and against a floor far below what
drift leaves.

In: Baseline, owners. Out: `Fault` for each group that looks wrong, with a cause.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moe_replay.routing.guard.baseline import Baseline
from moe_replay.routing.guard.counts import PLACES
from moe_replay.routing.guard.places import RouteRows, look_closer
from moe_replay.routing.guard.statistics import shortfall_nats
from moe_replay.routing.guard.verdict import Fault, Finding, Owner, Status, Verdict

if TYPE_CHECKING:
    from jaxtyping import Float64, Int64

    from moe_replay.routing.guard.table import StepPart

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


def _step_faults(
    baseline: Baseline,
    stray: Int64[np.ndarray, " samples"],
    apart: Float64[np.ndarray, " samples"],
    alpha: float,
) -> Iterator[Fault]:
    table = baseline.table
    threshold = math.log(2 * _KINDS / alpha)
    yield from _strewn("step", "", stray, table.num_rows, threshold)
    stretches = np.sum([part.stretches for part in table.parts], axis=0)
    share = _share(apart, table.num_rows)
    yield from _stretch_faults("step", "", stretches, share, baseline, threshold)
    nearer, farther = table.nearer @ apart, table.farther @ apart
    yield from _paired("step", "", nearer, farther, baseline, threshold)
    room = 1 - table.chance.sum(axis=1) / np.maximum(table.slots.sum(axis=1), 1)
    if np.median(room) > MIN_ROOM and table.slots.sum() >= _MIN_SLOTS:
        kept = float(np.median(table.information()))
        nats = _floor_nats(baseline, table.own, table.chance, table.slots, single=False)
        if kept < FLOOR and nats > threshold:
            cause = f"no sample's routes carry information: {_NOWHERE}, and the median sample keeps {max(kept, 0):.0%} of it"
            yield _lost_to_something("step", "", cause, nats, threshold)


def _share(
    apart: Float64[np.ndarray, " samples"], num_rows: Int64[np.ndarray, " samples"]
) -> float:
    """Return the share of independent rows over all samples."""
    return float((apart * num_rows).sum() / max(num_rows.sum(), 1))


def _stretch_faults(
    kind: str,
    name: str,
    stretches: Float64[np.ndarray, "quantities stretches"],
    share: float,
    baseline: Baseline,
    threshold: float,
) -> Iterator[Fault]:
    """Yield a fault for the most clearly wrong stretch of all samples, such as their end."""
    num = stretches.shape[1]
    total = np.concatenate([np.zeros((len(stretches), 1)), np.cumsum(stretches, axis=1)], axis=1)
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
    effect = np.array([effects[0] for effects in baseline.effects])
    half = np.full(nearer.shape, 0.5)
    paired = share * shortfall_nats(farther, nearer + farther, half, effect[1:, None])
    room = slots - chance
    due = (chance + FLOOR * room) / np.maximum(slots, 1.0)
    kept = shortfall_nats(own, slots, due, effect[0])
    silent = (room <= MIN_ROOM * slots) | (own >= MAX_FLOOR_AGREEMENT * slots)
    kept[silent | (slots < _MIN_SLOTS)] = 0.0
    best = np.maximum(paired.max(axis=0), kept)
    at = int(best.argmax())
    threshold += math.log(len(first))
    if best[at] <= threshold:
        return
    fits = (
        f"the routes at '{PLACES[int(paired[:, at].argmax())]}' fit better than the replayed ones"
    )
    cause = (
        f"from {first[at] / num:.0%} to {end[at] / num:.0%} of the rows of each sample, "
        f"{fits if paired[:, at].max() > threshold else _NOWHERE}"
    )
    yield Fault(
        kind=kind,
        name=name,
        cause=cause,
        nats=float(best[at]),
        threshold=threshold,
        may_be_drift=bool(paired[:, at].max() <= threshold),
    )


def _layer_faults(
    baseline: Baseline, apart: Float64[np.ndarray, " samples"], alpha: float
) -> Iterator[Fault]:
    table = baseline.table
    share = _share(apart, table.num_rows)
    threshold = math.log(2 * _KINDS * len(table.layers) / alpha)
    information = table.layer_information()
    if np.median(table.information()) < FLOOR:
        return  # the step's fault, not a layer's
    for entry, layer in enumerate(table.layers):
        name = str(layer)
        nearer, farther = (
            share * table.layer_nearer[:, entry],
            share * table.layer_farther[:, entry],
        )
        yield from _paired("layer", name, nearer, farther, baseline, threshold, single=True)
        known = np.isfinite(information[:, entry])
        slots, chance = table.slots[:, [entry]], table.chance[:, [entry]]
        if not known.any() or 1 - chance.sum() / max(slots.sum(), 1) <= MIN_ROOM:
            continue
        if table.alike[entry] > 0.5:
            continue  # a collapsed router whose last expert is a near tie: all rows share the same slots, but not all slots
        kept = float(np.median(information[known, entry]))
        nats = _floor_nats(baseline, table.own[:, [entry]], chance, slots, single=True)
        if kept < FLOOR and slots.sum() >= _MIN_SLOTS and nats > threshold:
            cause = (
                f"{_NOWHERE} of the sample, and the median sample keeps {max(kept, 0):.0%} of the information: the engine "
                "did not capture this layer, or captured another"
            )
            yield _lost_to_something("layer", name, cause, nats, threshold)


def _rank_faults(
    baseline: Baseline, apart: Float64[np.ndarray, " samples"], alpha: float
) -> Iterator[Fault]:
    table = baseline.table
    if len(table.parts) < 2:
        return
    threshold = math.log(2 * _KINDS * len(table.parts) / alpha)
    for rank, part in zip(table.ranks, table.parts, strict=True):
        at = np.searchsorted(table.sample_ids, part.sample_ids)
        nearer, farther = part.nearer @ apart[at], part.farther @ apart[at]
        share = _share(apart[at], part.num_rows.astype(np.int64))
        found = [
            *_stretch_faults("rank", str(rank), part.stretches, share, baseline, threshold),
            *_paired("rank", str(rank), nearer, farther, baseline, threshold),
        ]
        kappa = baseline.kappa[baseline.version_entry[at]]
        kappa = kappa[:, np.searchsorted(table.layers, part.layers)]
        slots = np.repeat(part.num_rows[:, None] * float(part.topk), len(part.layers), axis=1)
        lost = tuple(
            _lost("rank", str(rank), part.own, part.chance, slots, kappa, baseline, threshold)
        )
        found += lost or _nowhere_on(rank, part, slots, baseline, threshold)
        yield from _of_samples(part.sample_ids, found)


def _nowhere_on(
    rank: int, part: StepPart, slots: np.ndarray, baseline: Baseline, threshold: float
) -> Iterator[Fault]:
    """Yield a fault if the rows of a rank keep no information in any sample.

    Then no sample stands out: contiguous routes under zigzag context parallelism are wrong for half
    the rows of one rank and all rows of the other, and the median over both keeps a quarter.
    """
    room = slots.astype(np.float64) - part.chance
    information = (part.own - part.chance).sum(axis=1) / np.maximum(room.sum(axis=1), 1e-9)
    if room.sum() <= MIN_ROOM * slots.sum() or slots.sum() < _MIN_SLOTS:
        return
    if np.median(baseline.table.information()) < FLOOR:
        return  # the step's fault, not a rank's
    kept = float(np.median(information))
    nats = _floor_nats(baseline, part.own, part.chance, slots, single=False)
    if kept < FLOOR and nats > threshold:
        cause = (
            f"{_NOWHERE} of the sample, and the median sample keeps {max(kept, 0):.0%} of the information in the rows and "
            "layers of this rank: its routes were cut for other rows than its tokens"
        )
        yield _lost_to_something("rank", str(rank), cause, nats, threshold)


def _server_faults(
    baseline: Baseline,
    stray: Int64[np.ndarray, " samples"],
    apart: Float64[np.ndarray, " samples"],
    owners: Mapping[int, Owner],
    alpha: float,
) -> Iterator[Fault]:
    table = baseline.table
    of = [owners.get(int(number), Owner()).server for number in table.sample_ids]
    servers = sorted({server for server in of if server is not None})
    if len(servers) < 2:
        return
    threshold = math.log(2 * _KINDS * len(servers) / alpha)
    for server in servers:
        at = np.array([name == server for name in of])
        nearer, farther = table.nearer[:, at] @ apart[at], table.farther[:, at] @ apart[at]
        kappa = baseline.kappa[baseline.version_entry[at]]
        own, chance, slots = table.own[at], table.chance[at], table.slots[at]
        found = (
            *_paired("server", server, nearer, farther, baseline, threshold),
            *_strewn("server", server, stray[at], table.num_rows[at], threshold),
            *_lost("server", server, own, chance, slots, kappa, baseline, threshold),
        )
        yield from _of_samples(table.sample_ids[at], found)


def _of_samples(
    sample_ids: Int64[np.ndarray, " samples"], faults: Iterable[Fault]
) -> Iterator[Fault]:
    for fault in faults:
        yield replace(fault, samples=tuple(sample_ids.tolist()))


def _lost_to_something(kind: str, name: str, cause: str, nats: float, threshold: float) -> Fault:
    return Fault(
        kind=kind, name=name, cause=cause, nats=nats, threshold=threshold, may_be_drift=True
    )


def _strewn(
    kind: str,
    name: str,
    stray: Int64[np.ndarray, " samples"],
    num_rows: Int64[np.ndarray, " samples"],
    threshold: float,
) -> Iterator[Fault]:
    """Yield a fault if more rows fit nowhere than any drift explains."""
    rows, count = float(num_rows.sum()), float(stray.sum())
    kept = shortfall_nats(
        np.array([rows - count]), np.array([rows]), np.array([1 - MAX_STRAY]), _ROWS_AS_ONE
    )
    if kept[0] > threshold:
        cause = f"{count / max(rows, 1):.0%} of the rows, scattered over the samples, have routes of other tokens"
        yield _lost_to_something(kind, name, cause, float(kept[0]), threshold)


def _paired(
    kind: str,
    name: str,
    nearer: np.ndarray,
    farther: np.ndarray,
    baseline: Baseline,
    threshold: float,
    *,
    single: bool = False,
) -> Iterator[Fault]:
    """Yield a fault if routes at another place fit the group's rows better than their own."""
    either = (nearer + farther).astype(np.float64)
    effect = np.array([effects[int(single)] for effects in baseline.effects[1:]])
    nats = shortfall_nats(farther.astype(np.float64), either, np.full(len(PLACES), 0.5), effect)
    best = int(nats.argmax())
    if nats[best] > threshold:
        cause = f"the routes at '{PLACES[best]}' fit better than the replayed ones"
        yield Fault(kind=kind, name=name, cause=cause, nats=float(nats[best]), threshold=threshold)


def _lost(
    kind: str,
    name: str,
    own: np.ndarray,
    chance: np.ndarray,
    slots: np.ndarray,
    kappa: Float64[np.ndarray, "samples layers"],
    baseline: Baseline,
    threshold: float,
) -> Iterator[Fault]:
    """Yield a fault if most samples of the group keep far less than the usual sample.

    Most, because single samples may lose their routes to drift; those are judged one by one.
    """
    room = slots - chance
    due = (chance + baseline.tolerance * kappa * room).sum(axis=1)
    below = own.sum(axis=1) < due
    if len(own) < _MIN_SAMPLES or below.mean() <= 0.5:
        return
    nats = _shortfall(own, due, slots, baseline, single=False)
    if nats > threshold:
        cause = f"{_NOWHERE} of the sample, in {int(below.sum())} of its {len(own)} samples, unlike those of the others"
        yield _lost_to_something(kind, name, cause, nats, threshold)


def _floor_nats(
    baseline: Baseline, own: np.ndarray, chance: np.ndarray, slots: np.ndarray, *, single: bool
) -> float:
    """Return nats of such a low overlap if the samples kept `FLOOR` of the information."""
    if own.sum() >= MAX_FLOOR_AGREEMENT * slots.sum():
        return 0.0
    return _shortfall(own, chance + FLOOR * (slots - chance), slots, baseline, single=single)


def _shortfall(
    own: np.ndarray, due: np.ndarray, slots: np.ndarray, baseline: Baseline, *, single: bool
) -> float:
    hits, expected, total = (np.array([float(values.sum())]) for values in (own, due, slots))
    share = expected / np.maximum(total, 1.0)
    return float(shortfall_nats(hits, total, share, baseline.effects[0][int(single)])[0])


def explain_faults(verdict: Verdict, rows: RouteRows, *, usual_information: float) -> Verdict:
    """Return the verdict with causes of its faults, found in the sample with the lowest agreement.

    If every sample is wrong, no usual one exists to compare with, so half of full information is
    required.
    """
    if not verdict.faults or not len(verdict.sample_ids):
        return verdict
    worst = int(verdict.sample_ids[int(verdict.agreement.argmin())])
    faults = []
    for fault in verdict.faults:
        layer = int(fault.name) if fault.kind == "layer" else None
        looked = look_closer(
            rows, [_all_rows_of(worst, layer)], usual_information=max(usual_information, 0.5)
        )
        said = next((look.place or look.cause for look in looked.values()), None)
        words = f"{fault.cause}; in sample {worst}: {said}" if said else fault.cause
        faults.append(replace(fault, cause=words))
    return replace(verdict, faults=tuple(faults))


def _all_rows_of(sample: int, layer: int | None = None) -> Finding:
    """Return a suspect with all of its rows."""
    return Finding(
        sample=sample,
        status=Status.SUSPECT,
        test="",
        nats=0.0,
        threshold=0.0,
        cause="",
        layer=layer,
        first=0,
        last=2**31 - 1,
        agreement=0.0,
        owner=Owner(),
    )
