"""Agreement: how much live and replayed routes share, what rows share by chance, and where the floor lies.

In: GuardEvidence. Out: Overlaps, Agreement. Called by: diagnosis, guard.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moe_replay.errors import RecipeError, TraceError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float64, Int64, Integer

HEALTHY_OVERLAP = 0.8
"""Slot overlap that aligned routes reach even under heavy drift."""
_FLOOR_SHARE = 0.3  # of the way from chance to healthy
_LEAST_ROOM = 0.1  # between chance and healthy, below which the floor cannot decide


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GuardEvidence:
    """Live routes of a few rows of one microbatch, next to the routes that were replayed for all of its rows."""

    live_ids: Integer[np.ndarray, "sampled layers topk"]
    """``[sampled, layers, topk]``, top-k of the current weights, in any order within a row."""
    rows: Integer[np.ndarray, " sampled"]
    """``[sampled]``, local row of each entry of ``live_ids``; every one valid."""
    expert_ids: Integer[np.ndarray, "rows layers topk"]
    """``[rows, layers, topk]``, replayed ids of all local rows. Rows with ``valid=False`` hold anything."""
    valid: Bool[np.ndarray, " rows"]
    """``[rows]``, True where a route was replayed."""
    sample: Integer[np.ndarray, " rows"]
    """``[rows]``, number of the sample that the row belongs to, -1 at padding."""
    position: Integer[np.ndarray, " rows"]
    """``[rows]``, position of the token in its own sample."""
    layers: tuple[int, ...]
    """Global decoder index of each entry of the layer dim."""

    def __post_init__(self) -> None:
        sampled, rows = len(self.rows), len(self.valid)
        expected = {
            "live_ids": (self.live_ids.shape, (sampled, *self.expert_ids.shape[1:])),
            "expert_ids": (self.expert_ids.shape[:2], (rows, len(self.layers))),
            "sample": (self.sample.shape, (rows,)),
            "position": (self.position.shape, (rows,)),
        }
        for name, (got, wanted) in expected.items():
            if got != wanted:
                raise TraceError(
                    f"guard evidence: {name} has shape {got}, expected {wanted} for {rows} local rows, "
                    f"{sampled} sampled ones and layers {list(self.layers)}; hand over the arrays of one microbatch"
                )
        if not self.valid[self.rows].all():
            raise TraceError(
                f"guard evidence: {int((~self.valid[self.rows]).sum())} of {sampled} sampled rows are valid=False, "
                "expected none; nothing was replayed there, so sample rows from np.flatnonzero(valid)"
            )

    def select(self, chosen: np.ndarray) -> GuardEvidence:
        """Return the evidence of the sampled rows that ``chosen`` (a mask or positions) picks."""
        return GuardEvidence(
            live_ids=self.live_ids[chosen],
            rows=self.rows[chosen],
            expert_ids=self.expert_ids,
            valid=self.valid,
            sample=self.sample,
            position=self.position,
            layers=self.layers,
        )


class Overlaps:
    """Slot overlaps between the live routes of the sampled rows and any other routes of the microbatch."""

    def __init__(self, evidence: GuardEvidence, num_experts: int) -> None:
        self.evidence = evidence
        self.num_experts = num_experts
        sampled, layers, _ = evidence.live_ids.shape
        self.live = np.zeros((sampled, layers, num_experts), dtype=bool)
        np.put_along_axis(self.live, evidence.live_ids.astype(np.int64), True, axis=2)
        self.ids = evidence.expert_ids[evidence.rows].astype(np.int64)
        self.sample = evidence.sample[evidence.rows]
        self.position = evidence.position[evidence.rows].astype(np.int64)
        self.samples = np.unique(evidence.sample[evidence.valid])
        self._place = self._table()
        self.aligned = self.of_ids(self.ids)

    def of_ids(
        self, ids: Int64[np.ndarray, "sampled layers topk"]
    ) -> Float64[np.ndarray, "sampled layers"]:
        """Return ``|live & ids| / topk``."""
        return np.take_along_axis(self.live, ids, axis=2).mean(axis=2)

    def of_place(
        self, sample: Integer[np.ndarray, " sampled"], position: Int64[np.ndarray, " sampled"]
    ) -> Float64[np.ndarray, "sampled layers"]:
        """Return the overlap with the routes at other places; nan where no route is held for one."""
        rows = self._row_at(sample, position)
        held = rows >= 0
        ids = np.where(
            held[:, None, None], self.evidence.expert_ids[np.where(held, rows, 0)], 0
        ).astype(np.int64)
        return np.where(held[:, None], self.of_ids(ids), np.nan)

    def of_token_shift(self, shift: int) -> Float64[np.ndarray, "sampled layers"]:
        """Return the overlap with the routes that lie ``shift`` tokens later in the same sample."""
        return self.of_place(self.sample, self.position + shift)

    def along_sample(self, entry: int) -> Float64[np.ndarray, " positions"]:
        """Return the mean overlap of sampled row ``entry`` with the route at each position of its sample; nan without."""
        rows = self._place[np.searchsorted(self.samples, self.sample[entry])]
        held = rows >= 0
        ids = self.evidence.expert_ids[rows[held]].astype(np.int64)
        found = np.full(len(rows), np.nan)
        found[held] = self.live[entry][np.arange(ids.shape[1])[:, None], ids].mean(axis=(1, 2))
        return found

    def of_layer_shift(self, shift: int) -> Float64[np.ndarray, "sampled layers"]:
        """Return the overlap with the routes that lie ``shift`` layer entries later; nan past the ends."""
        source = np.arange(self.ids.shape[1]) + shift
        inside = (source >= 0) & (source < self.ids.shape[1])
        found = self.of_ids(self.ids[:, np.where(inside, source, 0)])
        return np.where(inside, found, np.nan)

    def _table(self) -> Int64[np.ndarray, "samples positions"]:
        evidence = self.evidence
        rows = np.flatnonzero(evidence.valid)
        width = int(evidence.position[rows].max()) + 1 if len(rows) else 1
        table = np.full((len(self.samples), width), -1, dtype=np.int64)
        table[np.searchsorted(self.samples, evidence.sample[rows]), evidence.position[rows]] = rows
        return table

    def _row_at(
        self, sample: Integer[np.ndarray, " sampled"], position: Int64[np.ndarray, " sampled"]
    ) -> Int64[np.ndarray, " sampled"]:
        inside = (position >= 0) & (position < self._place.shape[1])
        entry = np.searchsorted(self.samples, sample)
        return np.where(inside, self._place[entry, np.where(inside, position, 0)], -1)


def row_gain(
    overlap: Float64[np.ndarray, "sampled layers"], aligned: Float64[np.ndarray, "sampled layers"]
) -> Float64[np.ndarray, " sampled"]:
    """Return by how much each row's overlap beats the aligned one, over the layers that have both; else nan."""
    held = np.isfinite(overlap)
    count = held.sum(axis=1)
    gain = np.where(held, overlap - aligned, 0.0).sum(axis=1)
    return np.where(count > 0, gain / np.maximum(count, 1), np.nan)


def mean_error(
    values: Float64[np.ndarray, "rows ..."], slots: int
) -> Float64[np.ndarray, " layers"] | np.float64:
    """Return the standard error of the mean over rows of ``slots`` slots each.

    It is no smaller than independent healthy slots would have it: a few rows can agree with each other by luck.
    """
    least = (HEALTHY_OVERLAP * (1 - HEALTHY_OVERLAP) / slots) ** 0.5
    return np.maximum(values.std(axis=0), least) / len(values) ** 0.5


def agreement_floor(num_experts: int, topk: int, chance: float | None = None) -> float:
    """Return the slot overlap below which routes are taken for misaligned.

    It lies 30 % of the way from ``chance`` (default: ``topk / num_experts``, evenly used experts) to
    `HEALTHY_OVERLAP`: 0.28 for 8 of 128 experts, 0.42 for 4 of 16. Above a chance of 0.7 it is 0.0: no decision.
    """
    if not 1 <= topk < num_experts:
        raise RecipeError(
            f"topk is {topk} of {num_experts} experts, expected at least 1 and fewer than all"
        )
    base = topk / num_experts if chance is None else chance
    room = HEALTHY_OVERLAP - base
    return base + _FLOOR_SHARE * room if room >= _LEAST_ROOM else 0.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Agreement:
    """How well replayed and live routes agree, by layer. Sum agreements of many checks with `Agreement.total`."""

    layers: tuple[int, ...]
    """Global decoder indices, increasing."""
    num_rows: Int64[np.ndarray, " layers"]
    """``[layers]``, rows compared in each layer."""
    slot_overlap: Float64[np.ndarray, " layers"]
    """``[layers]``, mean share of the topk slots on which both agree; 0 without rows."""
    equal_sets: Float64[np.ndarray, " layers"]
    """``[layers]``, share of rows whose expert sets are the same; 0 without rows."""
    chance: Float64[np.ndarray, " layers"]
    """``[layers]``, mean slot overlap with the routes of other rows; 0 without rows."""

    @property
    def mean_slot_overlap(self) -> float:
        """Slot overlap over all rows and layers; nan without rows."""
        return _weighted(self.slot_overlap, self.num_rows)

    @property
    def mean_equal_sets(self) -> float:
        """Share of (row, layer) pairs that are no flip; nan without rows."""
        return _weighted(self.equal_sets, self.num_rows)

    @property
    def mean_chance(self) -> float:
        """Chance overlap over all rows and layers; nan without rows."""
        return _weighted(self.chance, self.num_rows)

    @staticmethod
    def total(parts: Iterable[Agreement]) -> Agreement:
        """Add agreements up, layer by layer; parts may hold different layers."""
        given = list(parts)
        layers = sorted({layer for part in given for layer in part.layers})
        place = {layer: index for index, layer in enumerate(layers)}
        rows = np.zeros(len(layers), dtype=np.int64)
        sums = np.zeros((3, len(layers)))
        for part in given:
            at = [place[layer] for layer in part.layers]
            rows[at] += part.num_rows
            sums[:, at] += part.num_rows * np.stack(
                [part.slot_overlap, part.equal_sets, part.chance]
            )
        overlap, equal, chance = sums / np.maximum(rows, 1)
        return Agreement(
            layers=tuple(layers),
            num_rows=rows,
            slot_overlap=overlap,
            equal_sets=equal,
            chance=chance,
        )


def measure_agreement(evidence: GuardEvidence, *, num_experts: int) -> Agreement:
    """Measure slot overlap, set equality and chance of each layer."""
    return agreement_of(Overlaps(evidence, num_experts))


def agreement_of(found: Overlaps) -> Agreement:
    """Sum overlaps up by layer; see `measure_agreement`."""
    evidence, overlap = found.evidence, found.aligned
    sampled, num_layers, topk = evidence.live_ids.shape
    used = evidence.expert_ids[evidence.valid].astype(np.int64)
    chance = np.full(num_layers, topk / found.num_experts)
    if sampled and len(used) > 1:
        shared = np.empty(num_layers)
        for layer in range(num_layers):
            replayed = np.bincount(used[:, layer].ravel(), minlength=found.num_experts)
            shared[layer] = found.live[:, layer].sum(axis=0) @ replayed / topk
        # Every sampled row also met its own route, which is no other row's.
        chance = (shared - overlap.sum(axis=0)) / (sampled * (len(used) - 1))
    empty = np.zeros(num_layers)
    return Agreement(
        layers=evidence.layers,
        num_rows=np.full(num_layers, sampled, dtype=np.int64),
        slot_overlap=overlap.mean(axis=0) if sampled else empty,
        equal_sets=(overlap > 1 - 1e-9).mean(axis=0) if sampled else empty,
        chance=chance if sampled else empty,
    )


def _weighted(values: Float64[np.ndarray, " layers"], rows: Int64[np.ndarray, " layers"]) -> float:
    return float(values @ rows / rows.sum()) if rows.sum() else float("nan")
