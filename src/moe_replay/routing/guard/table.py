"""What the ranks exchange in a step, and the table that every rank makes of it.

A `StepPart` is what one rank counted: its layers and its rows of some samples. Parts are small (two
numbers for each sample and layer, two dozen for each sample) and all ranks gather them; per-row
counts stay on their rank. Example: 8,192 samples x 48 layers are 3.1 MB in all, and 1.2 MB for the
rest. `SampleEvidence` is what a rank then found in its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float32, Float64, Int8, Int16, Int32, Int64

NUM_BINS = 300
"""Bins of the histogram of the windows' information, over `BIN_RANGE`."""
BIN_RANGE = (-0.5, 1.0)
NUM_STRETCHES = 16
"""Number of parts into which the rows of each sample are divided."""
TESTS = (
    "paired layer",
    "paired window",
    "lost layer",
    "lost window",
    "strict layer",
    "strict window",
    "equal rows",
)
"""Tests within a sample, made by the rank that holds its rows."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepPart:
    """What one rank counted in one step: its layers, its rows."""

    layers: tuple[int, ...]
    """Global decoder indices."""
    topk: int
    """Experts a token."""
    num_experts: int
    """Experts a layer."""
    sample_ids: Int64[np.ndarray, " samples"]
    """``[samples]``, increasing."""
    num_rows: Int32[np.ndarray, " samples"]
    """``[samples]``, rows compared here."""
    own: Float32[np.ndarray, "samples layers"]
    """``[samples, layers]``, slots that live and replayed routes share."""
    chance: Float32[np.ndarray, "samples layers"]
    """``[samples, layers]``, slots shared by chance: with the routes of other rows of the sample
    here."""
    alike: Int32[np.ndarray, " layers"]
    """``[layers]``, samples whose rows all share the same number of slots, but not all slots: a
    router collapsed onto a near tie."""
    flips: Float32[np.ndarray, " layers"]
    """``[layers]``, rows whose expert sets differ."""
    rows_with_flip: int
    """Rows whose expert sets differ in any layer of this rank."""
    nearer: Int64[np.ndarray, "places samples"]
    """``[places, samples]``, slots by which routes at another place fit better, over layers."""
    farther: Int64[np.ndarray, "places samples"]
    """``[places, samples]``, slots by which they fit worse, over layers."""
    layer_nearer: Int64[np.ndarray, "places layers"]
    """``[places, layers]``, the same over samples."""
    layer_farther: Int64[np.ndarray, "places layers"]
    """``[places, layers]``, the same over samples."""
    stretches: Float64[np.ndarray, "quantities stretches"]
    """``[3 + 2 * places, stretches]``, slots, own, chance, then nearer and farther of each place,
    summed over all samples for each sixteenth of a sample: a fault at the end of every sample shows
    here."""
    effects: Float32[np.ndarray, "signs 2 samples"]
    """``[1 + places, 2, samples]``, slots that act as one, for ``own`` and each place: over all
    layers, and in a single layer; nan for samples of fewer than 8 rows here."""
    window_information: Int64[np.ndarray, " bins"]
    """``[bins]``, histogram of the information that windows of 8 rows keep."""
    repeats: Int32[np.ndarray, "2 samples"]
    """``[2, samples]``, rows that repeat the previous row, and those of them whose next row repeats
    too."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepTable:
    """All parts of a step: a row for each sample, a column for each layer."""

    layers: tuple[int, ...]
    """Global decoder indices, increasing."""
    topk: int
    """Experts a token."""
    num_experts: int
    """Experts a layer."""
    sample_ids: Int64[np.ndarray, " samples"]
    """``[samples]``, increasing."""
    slots: Float64[np.ndarray, "samples layers"]
    """``[samples, layers]``, slots compared: rows times topk."""
    own: Float64[np.ndarray, "samples layers"]
    """``[samples, layers]``, slots that live and replayed routes share."""
    chance: Float64[np.ndarray, "samples layers"]
    """``[samples, layers]``, slots that they would share by chance."""
    nearer: Float64[np.ndarray, "places samples"]
    """``[places, samples]``, over layers."""
    farther: Float64[np.ndarray, "places samples"]
    """``[places, samples]``, over layers."""
    layer_nearer: Float64[np.ndarray, "places layers"]
    """``[places, layers]``, over samples."""
    layer_farther: Float64[np.ndarray, "places layers"]
    """``[places, layers]``, over samples."""
    alike: Float64[np.ndarray, " layers"]
    """``[layers]``, share of the samples whose rows are alike."""
    parts: tuple[StepPart, ...]
    """The parts of the ranks that compared rows, in rank order."""
    ranks: tuple[int, ...]
    """The rank of each part."""

    @property
    def agreement(self) -> Float64[np.ndarray, " samples"]:
        """``[samples]``, share of the slots on which live and replayed routes agree."""
        return self.own.sum(axis=1) / np.maximum(self.slots.sum(axis=1), 1)

    @property
    def layer_agreement(self) -> Float64[np.ndarray, " layers"]:
        """``[layers]``, the same by layer."""
        return self.own.sum(axis=0) / np.maximum(self.slots.sum(axis=0), 1)

    @property
    def num_rows(self) -> Int64[np.ndarray, " samples"]:
        """``[samples]``, rows compared."""
        return (self.slots.max(axis=1, initial=0) // self.topk).astype(np.int64)

    @classmethod
    def of(cls, parts: Sequence[StepPart | None]) -> StepTable:
        """Combine the parts of all ranks; None for ranks without rows.

        At least one rank has rows.
        """
        held = [part for part in parts if part is not None]
        assert held, "a step in which some rank compared a row"
        layers = sorted({layer for part in held for layer in part.layers})
        sample_ids = np.unique(np.concatenate([part.sample_ids for part in held]))
        size = (len(sample_ids), len(layers))
        slots, own, chance = np.zeros((3, *size))
        by_sample = np.zeros((2, len(held[0].nearer), len(sample_ids)))
        by_layer = np.zeros((2, len(held[0].nearer), len(layers)))
        alike, counted = np.zeros((2, len(layers)))
        for part in held:
            at = np.searchsorted(sample_ids, part.sample_ids)
            columns = np.searchsorted(layers, part.layers)
            cells = np.ix_(at, columns)
            slots[cells] += part.num_rows[:, None] * part.topk
            own[cells] += part.own
            chance[cells] += part.chance
            by_sample[:, :, at] += [part.nearer, part.farther]
            alike[columns] += part.alike
            counted[columns] += len(at)
            by_layer[:, :, columns] += [part.layer_nearer, part.layer_farther]
        return cls(
            layers=tuple(layers),
            topk=held[0].topk,
            num_experts=held[0].num_experts,
            sample_ids=sample_ids,
            slots=slots,
            own=own,
            chance=chance,
            nearer=by_sample[0],
            farther=by_sample[1],
            layer_nearer=by_layer[0],
            layer_farther=by_layer[1],
            alike=alike / np.maximum(counted, 1),
            parts=tuple(held),
            ranks=tuple(rank for rank, part in enumerate(parts) if part is not None),
        )

    def information(self) -> Float64[np.ndarray, " samples"]:
        """Return how far each sample is from chance (0) to full agreement (1), over all layers."""
        room = (self.slots - self.chance).sum(axis=1)
        return (self.own - self.chance).sum(axis=1) / np.maximum(room, 1e-9)

    def layer_information(self) -> Float64[np.ndarray, "samples layers"]:
        """Return the same for each layer; nan if nothing was compared, or chance leaves no room."""
        room = self.slots - self.chance
        return np.where(room > 1e-6, (self.own - self.chance) / np.maximum(room, 1e-6), np.nan)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampleEvidence:
    """The strongest sign of each test in each sample of one rank."""

    layers: tuple[int, ...]
    """Global decoder indices that this rank counted."""
    sample_ids: Int64[np.ndarray, " samples"]
    """``[samples]``, in any order."""
    nats: Float32[np.ndarray, "tests samples"]
    """``[tests, samples]``, of the strongest sign of each of `TESTS`."""
    place: Int8[np.ndarray, "tests samples"]
    """``[tests, samples]``, entry of `PLACES` that fits better; -1 for tests without places."""
    layer: Int16[np.ndarray, "tests samples"]
    """``[tests, samples]``, global layer of the sign; -1 for all layers of the rank."""
    explained: Float32[np.ndarray, "tests samples"]
    """``[tests, samples]``, share of the usual information that the routes at ``place`` have; 0
    without a place. Near 1: the right routes are there. Well below: they fit better than the wrong
    ones, but are not the right ones either."""
    first: Int32[np.ndarray, "tests samples"]
    """``[tests, samples]``, position of its first row."""
    last: Int32[np.ndarray, "tests samples"]
    """``[tests, samples]``, position of its last row."""
    stray: Int32[np.ndarray, " samples"]
    """``[samples]``, rows that clearly keep under a quarter of the median's information; equal ones
    count once."""
    apart: Float32[np.ndarray, " samples"]
    """``[samples]``, share of independent rows: 1 unless the text is repetitive."""


def join_evidence(parts: Sequence[SampleEvidence]) -> SampleEvidence | None:
    """Return the evidence of all microbatches of a rank as one; None without any."""
    if not parts:
        return None
    joined = {
        field.name: np.concatenate([getattr(part, field.name) for part in parts], axis=-1)
        for field in fields(SampleEvidence)
        if field.name != "layers"
    }
    return SampleEvidence(layers=parts[0].layers, **joined)
