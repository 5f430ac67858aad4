"""Signs that a rank finds within its samples: in single layers, in windows, in repeated rows.

Two tests matter. *Paired*: the live routes fit another place better than their own. However far a
router drifts, it is never systematically closer to another row's route than to the row's own, so
this needs no threshold on agreement. *Lost*: they fit their own place hardly better than the routes
of any other row of the sample, unlike in the median sample.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from moe_replay.routing.guard.baseline import Baseline
from moe_replay.routing.guard.counts import PLACES, OverlapCounts
from moe_replay.routing.guard.statistics import (
    row_keys,
    shortfall_nats,
    times_met,
    window_rows,
    window_sums,
)
from moe_replay.routing.guard.summary import row_chance, rows_are_alike
from moe_replay.routing.guard.table import TESTS, SampleEvidence

if TYPE_CHECKING:
    from jaxtyping import Float64

MIN_STALE_ROWS = 8
"""Shortest run of equal rows that counts: with 8 experts, one healthy step of 4,000 drawn ones had
five in a row."""
STRAY_KEEPS = 0.25
"""Share of the median's information below which a single row is stray."""
STALE_KEEPS = 0.8
"""Share of the usual information below which a run of equal rows is stale, not repetitive text."""
_STRAY_NATS = 3.0  # evidence that it is below
_FREE_SLOTS = 1 / 3  # of a row: what neighbouring tokens have in common decides the others
_ROW_EFFECT = 2.0  # slots of a row that act as one, at most


def judge(counts: OverlapCounts, baseline: Baseline) -> SampleEvidence:
    """Return the strongest sign of each test in each sample of ``counts``."""
    at = np.searchsorted(baseline.table.sample_ids, counts.sample_ids)
    columns = np.searchsorted(baseline.table.layers, counts.layers)
    kappa = baseline.kappa[baseline.version_entry[at]][:, columns]
    rows = counts.num_rows[:, None]
    slots = (rows * counts.topk).astype(np.float64)
    max_chance = baseline.max_chance[columns]
    chance = np.minimum(counts.layer_others / np.maximum(rows - 1, 1), slots * max_chance)
    room = slots - chance
    # One value for all layers, weighted by their room, because rows are not kept by layer.
    mean_kappa = (kappa * room).sum(axis=1) / np.maximum(room.sum(axis=1), 1e-9)
    row_slots = np.full(len(counts.own), float(counts.topk * len(counts.layers)))
    by_chance = np.minimum(row_chance(counts), counts.topk * max_chance.sum())
    row_room = np.repeat(mean_kappa, counts.num_rows) * (row_slots - by_chance)
    own = counts.own.astype(np.float64)
    alike = rows_are_alike(counts)
    # Text in a loop has the same flips in each round, so its equal rows count as one.
    met = _times_met(counts)
    once = 1 / met
    apart = counts.num_rows / _sums(met, counts)
    keeps = (by_chance + STRAY_KEEPS * row_room) / row_slots
    # Many stray rows inflate the measured effect; within a row it is at most 2.
    effect = min(baseline.effects[0][0], _ROW_EFFECT)
    clear = shortfall_nats(own, row_slots, keeps, effect) > _STRAY_NATS
    found = _Found(counts, stray=_sums(clear * once, counts), apart=apart)
    together, single = baseline.effects[0]
    for name, share in (("lost", baseline.tolerance), ("strict", baseline.strict)):
        # Example: of 100 slots 30 are shared by chance, the median sample keeps 0.8 of the room of
        # 70, and drift leaves 0.3 of that: 30 + 0.3 * 0.8 * 70 = 46.8 are due.
        # Rows that are all alike count as one row.
        # One extra slot, because two or three rows cannot show that every slot would be shared.
        expected = np.where(alike, 0.0, (chance + share * kappa * room) / (slots + 1))
        found.by_layer(
            f"{name} layer",
            apart[:, None]
            * shortfall_nats(counts.layer_own.astype(np.float64), slots, expected, single),
        )
        due = by_chance + share * row_room
        found.by_window(f"{name} window", once * own, once * row_slots, once * due, together)
    for place in range(len(PLACES)):
        together, single = baseline.effects[1 + place]
        nearer, farther = (
            v[place].astype(np.float64) for v in (counts.layer_nearer, counts.layer_farther)
        )
        nats = shortfall_nats(farther, nearer + farther, 0.5, single)
        there = counts.layer_own + nearer - farther
        explained = (there - chance) / np.maximum(kappa * room, 1e-9)
        found.by_layer("paired layer", apart[:, None] * nats, place, explained)
        nearer, farther = (v[place].astype(np.float64) for v in (counts.nearer, counts.farther))
        either = once * (nearer + farther)
        extra = own + nearer - farther - by_chance, row_room
        found.by_window("paired window", once * farther, either, either / 2, together, place, extra)
    of_tokens = -_FREE_SLOTS * row_slots * np.log(np.clip(by_chance / row_slots, 1e-9, 1.0))
    nats_a_row = np.minimum(-math.log(baseline.repeat), of_tokens)
    found.equal_rows(nats_a_row, own - by_chance, row_room, once)
    return found.evidence


def _sums(
    values: Float64[np.ndarray, " rows"], counts: OverlapCounts
) -> Float64[np.ndarray, " samples"]:
    return np.add.reduceat(values, counts.starts) if len(values) else np.zeros(0)


def _times_met(counts: OverlapCounts) -> Float64[np.ndarray, " rows"]:
    """Return how many rows of the sample have the same counts as each row: the same routes."""
    entry = np.repeat(np.arange(len(counts.num_rows)), counts.num_rows)
    columns = [entry, counts.own, counts.others, counts.flips, *counts.nearer, *counts.farther]
    return times_met(row_keys(np.stack([column.astype(np.int64) for column in columns], axis=1)))


class _Found:
    """The strongest sign of each test so far."""

    def __init__(
        self,
        counts: OverlapCounts,
        *,
        stray: Float64[np.ndarray, " samples"],
        apart: Float64[np.ndarray, " samples"],
    ) -> None:
        self._position = counts.position
        self._repeats = counts.repeats
        shape = len(TESTS), len(counts.sample_ids)
        first, last = np.zeros((2, *shape), np.int32)
        self.evidence = SampleEvidence(
            layers=counts.layers,
            sample_ids=counts.sample_ids,
            nats=np.zeros(shape, np.float32),
            place=np.full(shape, -1, np.int8),
            layer=np.full(shape, -1, np.int16),
            explained=np.zeros(shape, np.float32),
            first=first,
            last=last,
            stray=np.rint(stray).astype(np.int32),
            apart=apart.astype(np.float32),
        )
        self._windows = window_rows(counts.num_rows)
        self._starts, self._ends = counts.starts, counts.starts + counts.num_rows

    def by_layer(
        self,
        test: str,
        nats: Float64[np.ndarray, "samples layers"],
        place: int = -1,
        explained: Float64[np.ndarray, "samples layers"] | None = None,
    ) -> None:
        if not nats.size:
            return
        best = nats.argmax(axis=1)
        layer = np.array(self.evidence.layers)[best]
        there = 0.0 if explained is None else explained[np.arange(len(best)), best]
        found = nats.max(axis=1)
        self._keep(test, found, self._starts, self._ends, place, layer, there)

    def by_window(
        self,
        test: str,
        hits: Float64[np.ndarray, " rows"],
        slots: Float64[np.ndarray, " rows"],
        expected: Float64[np.ndarray, " rows"],
        effect: float,
        place: int = -1,
        extra: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        """Test all windows. ``extra``: information, and usual information, at ``place``, by row."""
        first, end, entry = self._windows
        if not len(first):
            return
        hit, slot, due = (window_sums(v, first, end) for v in (hits, slots, expected))
        nats = shortfall_nats(hit, slot, due / np.maximum(slot, 1e-9), effect)
        # Sorted by sample, then nats: the last window of each sample is its strongest.
        order = np.lexsort((nats, entry))
        best = order[np.flatnonzero(np.diff(entry[order], append=-1))]
        top = np.zeros(len(self._starts))
        begin, stop = self._starts.copy(), self._ends.copy()
        top[entry[best]], begin[entry[best]], stop[entry[best]] = nats[best], first[best], end[best]
        there: float | np.ndarray = 0.0
        if extra is not None:
            information, usual = (window_sums(values, begin, stop) for values in extra)
            there = information / np.maximum(usual, 1e-9)
        self._keep(test, top, begin, stop, place, explained=there)

    def equal_rows(
        self,
        nats_a_row: Float64[np.ndarray, " rows"],
        information: Float64[np.ndarray, " rows"],
        usual: Float64[np.ndarray, " rows"],
        once: Float64[np.ndarray, " rows"],
    ) -> None:
        """Find the longest run of repeated rows of each sample. ``once``: what each row counts.

        A sample that says one word over and over repeats its routes as well, and a live route here
        and there differs. But then the rows agree as usual; those of a stale stretch do not.

        A row repeats by chance as often as in the usual sample, or as often as these very tokens
        make likely, if that is more: where a share q of the slots agrees with those of any other
        row, a row of n slots repeats with a chance of q^(n/3). With 2 layers of top-2 and q = 0.45
        that is 0.34; with 4 layers it is 0.12, and 0.65 in a router that has all but collapsed,
        where q = 0.85.
        """
        repeats = self._repeats
        if not len(repeats):
            return
        index = np.arange(len(repeats))
        last_other = np.maximum.accumulate(np.where(repeats, -1, index))
        run = np.where(repeats, index - np.maximum(last_other, 0), 0)
        longest = np.maximum.reduceat(run, self._starts)
        end = np.zeros(len(self._starts), np.int64)
        for entry in np.flatnonzero(longest):
            part = run[self._starts[entry] : self._ends[entry]]
            end[entry] = self._starts[entry] + int(part.argmax())
        begin = np.where(longest > 0, end - longest, self._starts)
        stop = np.where(longest > 0, end + 1, self._ends)
        kept = window_sums(information, begin, stop)
        is_stale = kept < STALE_KEEPS * window_sums(usual, begin, stop)
        is_stale &= longest >= MIN_STALE_ROWS
        different = np.minimum(window_sums(once, begin, stop), longest)
        nats = different * window_sums(nats_a_row, begin, stop) / (stop - begin)
        self._keep("equal rows", np.where(is_stale, nats, 0.0), begin, stop)

    def _keep(
        self,
        test: str,
        nats: np.ndarray,
        first: np.ndarray,
        end: np.ndarray,
        place: int = -1,
        layer: int | np.ndarray = -1,
        explained: float | np.ndarray = 0.0,
    ) -> None:
        """Keep the signs, of rows ``first`` to ``end``, that are stronger than those so far."""
        held, row = self.evidence, TESTS.index(test)
        better = nats > held.nats[row]
        for into, values in (
            (held.nats, nats),
            (held.place, place),
            (held.layer, layer),
            (held.explained, np.clip(explained, -10, 10)),
            (held.first, self._position[first]),
            (held.last, self._position[end - 1]),
        ):
            into[row] = np.where(better, values, into[row])
