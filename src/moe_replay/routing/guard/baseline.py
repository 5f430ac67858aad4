"""The usual sample: medians, lower deciles and spreads over this step and recent ones.

Nothing is compared with an absolute number. How much information a sample keeps, how much samples
differ, how many slots act as one: all of it is measured on samples of the same policy version, in
the same layers. A few wrong samples do not move medians and deciles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moe_replay.routing.guard.statistics import MIN_WINDOW
from moe_replay.routing.guard.table import BIN_RANGE, NUM_BINS, StepTable
from moe_replay.routing.guard.verdict import StepRecord

if TYPE_CHECKING:
    from jaxtyping import Float64, Int64

TOLERANCE = (0.2, 0.4)
"""Bounds of the share of the median sample's information that drift leaves in any sample."""
MAX_STRICT = 0.95
"""Upper bound of that share for the strict test, which only asks for a second look."""
_OUTLIER = 5.0  # times the loss of the sample at the lower decile is more than drift takes
_POOL_SAMPLES = 32  # minimum for medians, filled up from recent steps
_MORE_CHANCE = 1.1  # times the chance of the median sample is still usual
_MIN_REPEATS_OF = 3  # samples, to omit the one with the longest stretch
_VERSION_SAMPLES = 16  # of a policy version, to be compared with each other


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Baseline:
    """What each sample of a step is compared with."""

    table: StepTable
    """The step that is judged."""
    version_entry: Int64[np.ndarray, " samples"]
    """``[samples]``, entry of ``kappa`` for each sample of the table."""
    kappa: Float64[np.ndarray, "versions layers"]
    """``[versions, layers]``, share of the information that the median sample of a policy version
    keeps, 0 to 1."""
    max_chance: Float64[np.ndarray, " layers"]
    """``[layers]``, upper bound of the share of slots that agree by chance. Repetitive text has
    rows that are all alike: the routes of any row fit as well as a row's own, and nothing is
    lost."""
    tolerance: float
    """Share of the median's information below which a sample has lost its routes.

    If the sample at the lower decile keeps 0.86 of it, drift takes 0.14, and 1 - 5 * 0.14 = 0.3 is
    left, within `TOLERANCE`.
    """
    strict: float
    """Share below which it deserves a second look."""
    effects: tuple[tuple[float, float], ...]
    """Slots that act as one within a part, for ``own`` and each place: over all its layers, and in
    one layer."""
    num_stages: float
    """Number of parts with different layers that the rows of a sample are spread over."""
    repeat: float
    """Probability that the row after a repeated row repeats too."""
    num_sets: int
    """Number of layers and windows tested within a sample."""
    record: StepRecord
    """This step in plain numbers, without stray rows yet."""

    @classmethod
    def measure(
        cls,
        table: StepTable,
        *,
        versions: Mapping[int, int] | None = None,
        history: Sequence[StepRecord] = (),
    ) -> Baseline:
        """Measure the usual sample.

        ``versions``: sample -> policy version, if they differ; ``history``: oldest first.
        """
        record = _record(table)
        past, weights = _newest(record, history)
        entry = _version_entries(table, versions)
        kappa = np.stack([_kappa(table, entry == v) for v in range(int(entry.max()) + 1)])
        if len(past) > 1 and len(kappa) == 1:
            for column, layer in enumerate(table.layers):
                values = [step.kappa.get(str(layer), kappa[0, column]) for step in past]
                kappa[0, column] = np.average(values, weights=weights)
        kept, window_kept = np.average(
            [(step.kept, step.window_kept) for step in past], axis=0, weights=weights
        )
        effects = np.average([step.effects for step in past], axis=0, weights=weights)
        rows, equal, again = np.sum([step.repeats for step in [*history, record]], axis=0)
        return cls(
            table=table,
            version_entry=entry,
            kappa=np.clip(kappa, 0.0, 1.0),
            max_chance=_MORE_CHANCE
            * np.median(table.chance / np.maximum(table.slots, 1.0), axis=0),
            tolerance=float(np.clip(1 - _OUTLIER * (1 - kept), *TOLERANCE)),
            strict=float(np.clip(1 - _OUTLIER * (1 - window_kept), TOLERANCE[0], MAX_STRICT)),
            effects=tuple((max(1.0, float(a)), max(1.0, float(b))) for a, b in effects),
            num_stages=len(table.layers) / float(np.mean([len(p.layers) for p in table.parts])),
            # Repetitive samples repeat more often than the average one: assume twice as often.
            repeat=min(0.9, 2 * max((again + 3) / (equal + 30), equal / max(rows, 1))),
            num_sets=len(table.layers) + 2 * (int(table.num_rows.max()) // (MIN_WINDOW // 2)),
            record=record,
        )


def _record(table: StepTable) -> StepRecord:
    information = table.information()
    middle = max(float(np.median(information)), 1e-6)
    bins = np.sum([part.window_information for part in table.parts], axis=0)
    effects = np.concatenate([part.effects for part in table.parts], axis=2)
    known = np.asarray(np.isfinite(effects).any(axis=2))
    medians = np.nanmedian(np.where(np.expand_dims(known, 2), effects, 1.0), axis=2)
    kappa = _kappa(table, np.ones(len(information), bool))
    kept = float(np.quantile(information, 0.1)) / middle
    return StepRecord(
        num_samples=len(information),
        information=middle,
        kappa={str(layer): float(k) for layer, k in zip(table.layers, kappa, strict=True)},
        kept=kept,
        # Without windows (short samples), the strict test uses full samples.
        window_kept=min(kept, _decile(bins) / middle) if bins.sum() else kept,
        effects=tuple((float(a), float(b)) for a, b in medians),
        repeats=_usual_repeats(table),
        stray=(0, 0, 0.0, 0.0),
    )


def _usual_repeats(table: StepTable) -> tuple[int, int, int]:
    """Count repeated rows, without the few samples with most, which would excuse themselves."""
    rows = np.concatenate([part.num_rows for part in table.parts])
    equal, again = np.concatenate([part.repeats for part in table.parts], axis=1)
    usual = np.argsort(again, kind="stable")[: len(again) - -(-len(again) // 20)]
    chosen = usual if len(usual) >= _MIN_REPEATS_OF else np.arange(len(again))
    return int(rows[chosen].sum()), int(equal[chosen].sum()), int(again[chosen].sum())


def _kappa(table: StepTable, chosen: np.ndarray) -> Float64[np.ndarray, " layers"]:
    """Return the median over samples; 0 for layers without room above chance."""
    information = table.layer_information()[chosen]
    known = np.isfinite(information).any(axis=0)
    return np.where(known, np.nanmedian(np.where(known, information, 0.0), axis=0), 0.0)


def _decile(bins: Int64[np.ndarray, " bins"]) -> float:
    low, high = BIN_RANGE
    bin_index = int(np.searchsorted(np.cumsum(bins), 0.1 * bins.sum()))
    return low + (bin_index + 0.5) * (high - low) / NUM_BINS


def _newest(
    record: StepRecord, history: Sequence[StepRecord]
) -> tuple[list[StepRecord], list[int]]:
    """Return this step and as many recent ones as make `_POOL_SAMPLES`, with their weights."""
    past, weights = [record], [record.num_samples]
    for step in reversed(history):
        missing = _POOL_SAMPLES - sum(weights)
        if missing <= 0:
            break
        past.append(step)
        weights.append(min(missing, step.num_samples))
    return past, weights


def _version_entries(
    table: StepTable, versions: Mapping[int, int] | None
) -> Int64[np.ndarray, " samples"]:
    """Index policy versions with enough samples; rare ones join the next older common one."""
    if versions is None:
        return np.zeros(len(table.sample_ids), np.int64)
    of = np.array([versions[int(number)] for number in table.sample_ids])
    values, counts = np.unique(of, return_counts=True)
    common = values[counts >= _VERSION_SAMPLES]
    if not len(common):
        return np.zeros(len(of), np.int64)
    return np.maximum(np.searchsorted(common, of, side="right") - 1, 0).astype(np.int64)
