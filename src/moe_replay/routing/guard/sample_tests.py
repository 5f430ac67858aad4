"""All tests of all samples, with the threshold at which each test suffices.

*Certain* tests cannot be triggered by drift (another place fits better, rows repeat). *Strong*
tests compare with the usual sample (information lost, stray rows), so strong drift could trigger
them. The engine gap adds to either, because both are independent in healthy samples; it never
suffices alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moe_replay.routing.guard.baseline import Baseline
from moe_replay.routing.guard.counts import PLACES
from moe_replay.routing.guard.statistics import excess_nats, gap_nats, shortfall_nats
from moe_replay.routing.guard.table import TESTS, SampleEvidence
from moe_replay.routing.guard.verdict import StepRecord

if TYPE_CHECKING:
    from jaxtyping import Bool, Float64, Int64

CERTAIN = ("paired sample", "paired layer", "paired window", "equal rows")
"""Tests that prove a misalignment alone."""
STRONG = ("lost sample", "lost layer", "lost window", "stray rows")
"""Tests that prove one unless a second look clears the sample."""
STRICT = ("strict sample", "strict layer", "strict window", "strict stray rows")
"""Tests that only ask for a second look."""
SUSPECT_NATS = 7.0
"""Nats of a strict test above which a sample is looked at again."""
ALL_TESTS = (*CERTAIN, *STRONG, *STRICT)
"""Rows of the arrays of `SampleTests`."""
_KINDS = len(PLACES) + 5  # of test: places, lost, stray, equal, gap, and one in reserve
_MIN_SIGN = 3.0  # nats of each of two signs that may be added
_BOTH_NATS = 9.0  # of a strict test and the gap together, for a second look
_RARE_NATS = 4.0  # above the largest gap of a step by chance: one step in 50
_MIN_GAPS = 8  # samples with a gap, to know what is usual
_CLEAN_SHARE = 0.95  # of the samples, those with the fewest stray rows
_FEWEST_SHARE = 0.5  # the same, if a fault may have hit up to half of them
# Factor on the stray rows of earlier steps, and share of all rows, that drift may add.
_STRAY_DRIFT = (3.0, 2e-4)
# Rows' worth of information lost for each stray row, above which drift has hit the others too.
# Random rows took 1 to 2.3 with 64 experts, and 4 to 15 with 8, where most of them are not clearly
# stray; drift alone took 18 and more.
_LOSS_A_STRAY_ROW = 3.0
_STRAY_TESTS = 3  # against nearly all samples, the cleaner half, earlier steps


class SampleTests:
    """Nats, threshold and place of every test and sample of a step."""

    def __init__(
        self,
        baseline: Baseline,
        evidence: Sequence[SampleEvidence | None],
        *,
        gaps: Mapping[int, float] | None,
        history: Sequence[StepRecord],
        alpha: float,
    ) -> None:
        self.baseline = baseline
        samples = baseline.table.sample_ids
        shape = len(ALL_TESTS), len(samples)
        self.nats = np.zeros(shape)
        """``[tests, samples]``"""
        self.place = np.full(shape, -1)
        """``[tests, samples]``, entry of `PLACES`, or -1."""
        self.layer = np.full(shape, -1)
        """``[tests, samples]``, global layer, -1 for all."""
        self.explained = np.zeros(shape)
        """``[tests, samples]``, share of the usual information that the routes at ``place``
        have."""
        self.first = np.zeros(shape, np.int64)
        """``[tests, samples]``, first position."""
        self.last = np.repeat(baseline.table.num_rows[None] - 1, shape[0], axis=0)
        """``[tests, samples]``, last position."""
        once = math.log(2 * _KINDS * len(samples) / alpha)
        within = once + math.log(baseline.num_sets)
        self.thresholds = np.array([within if _is_within(test) else once for test in ALL_TESTS])
        """``[tests]``, nats at which each suffices.

        With 128 samples ``once`` is ln(2 * 10 * 128 / 1e-4) = 17.
        """
        held = [part for part in evidence if part is not None]
        self.apart = apart = np.ones(len(samples))
        """``[samples]``, share of independent rows, on the rank where it is lowest."""
        for part in held:
            at = np.searchsorted(samples, part.sample_ids)
            apart[at] = np.minimum(apart[at], part.apart)
        self._whole_samples(apart)
        for part in held:
            self._take(part)
        self.stray = self._stray_counts(held)
        """``[samples]``, rows that clearly fit no place."""
        self.record_stray = _clean_stray(self.stray, baseline.table.num_rows, _CLEAN_SHARE)
        """What later steps remember of the stray rows."""
        self._set_stray_rows(history)
        self.gap = self._gap_nats(gaps)
        """``[samples]``, nats of the engine gap; 0 if usual or unknown."""

    @property
    def with_gap(self) -> Float64[np.ndarray, "tests samples"]:
        """``[tests, samples]``, nats plus gap, minus the price of adding two signs.

        Example: a sign of 12 nats with threshold 17 and a gap of 9 make 12 + 9 - ln(1 + 17) = 18.1:
        above the threshold.
        """
        both = (self.nats > _MIN_SIGN) & (self.gap > _MIN_SIGN)
        price = np.log1p(self.thresholds)[:, None]
        return np.where(both, np.maximum(self.nats, self.nats + self.gap - price), self.nats)

    @property
    def margins(self) -> Float64[np.ndarray, "tests samples"]:
        """``[tests, samples]``, nats above the threshold; for strict tests above `SUSPECT_NATS`."""
        limit = np.where(_rows(STRICT), SUSPECT_NATS, self.thresholds)[:, None]
        return np.where(_rows(STRICT)[:, None], self.nats, self.with_gap) - limit

    def best(self, tests: Sequence[str]) -> tuple[Float64[np.ndarray, " samples"], np.ndarray]:
        """Return the largest margin of each sample over ``tests``, and the test that has it."""
        chosen = np.flatnonzero(_rows(tests))
        part = self.margins[chosen]
        return part.max(axis=0), chosen[part.argmax(axis=0)]

    def is_telling(self) -> Bool[np.ndarray, " samples"]:
        """Return which samples show a sign that is rare in healthy ones, for sums over steps."""
        many = math.log(self.baseline.num_sets)
        price = np.array([many if _is_within(test) else 0.0 for test in ALL_TESTS])
        telling = (self.nats - price[:, None])[~_rows(STRICT)] > SUSPECT_NATS
        return np.asarray(telling.any(axis=0))

    def asks_for_a_look(self) -> Bool[np.ndarray, " samples"]:
        """Return which samples deserve a second look: for a strict test, their gap, or both.

        By chance one sample a step has a gap of ln(samples) nats, so a gap alone must be larger
        than that.
        """
        strict = self.nats[_rows(STRICT)].max(axis=0)
        both = (strict > _MIN_SIGN) & (self.gap > _MIN_SIGN) & (strict + self.gap > _BOTH_NATS)
        alone = self.gap > math.log(len(self.gap)) + _RARE_NATS
        return (strict > SUSPECT_NATS) | both | alone

    def _set(self, test: str, nats: np.ndarray, place: np.ndarray | None = None) -> None:
        self.nats[ALL_TESTS.index(test)] = nats
        if place is not None:
            self.place[ALL_TESTS.index(test)] = place

    def _whole_samples(self, apart: Float64[np.ndarray, " samples"]) -> None:
        baseline, table = self.baseline, self.baseline.table
        kappa = baseline.kappa[baseline.version_entry]
        slots = table.slots.sum(axis=1)
        chance = np.minimum(table.chance, table.slots * baseline.max_chance)
        for test, share in (("lost", baseline.tolerance), ("strict", baseline.strict)):
            due = (chance + share * kappa * (table.slots - chance)).sum(axis=1)
            own = table.own.sum(axis=1)
            nats = shortfall_nats(own, slots, due / (slots + 1), self._effect(0))
            self._set(f"{test} sample", apart * nats)
        either = table.nearer + table.farther
        effect = np.array([self._effect(1 + place) for place in range(len(PLACES))])
        nats = shortfall_nats(table.farther, either, 0.5, effect[:, None])
        best = nats.argmax(axis=0)
        self._set("paired sample", apart * nats.max(axis=0), best)
        gain = (table.nearer - table.farther)[best, np.arange(len(best))]
        usual = (kappa * (table.slots - table.chance)).sum(axis=1)
        there = table.own.sum(axis=1) + gain - table.chance.sum(axis=1)
        self.explained[ALL_TESTS.index("paired sample")] = there / np.maximum(usual, 1e-9)

    def _effect(self, entry: int) -> float:
        """Return the slots that act as one over all stages, as if stages were fully correlated."""
        return 1 + (self.baseline.effects[entry][0] - 1) * self.baseline.num_stages

    def _take(self, part: SampleEvidence) -> None:
        at = np.searchsorted(self.baseline.table.sample_ids, part.sample_ids)
        for source, test in enumerate(TESTS):
            row = ALL_TESTS.index(test)
            better = part.nats[source] > self.nats[row, at]
            for name in ("nats", "place", "layer", "explained", "first", "last"):
                getattr(self, name)[row, at[better]] = getattr(part, name)[source][better]

    def _stray_counts(self, held: Sequence[SampleEvidence]) -> Int64[np.ndarray, " samples"]:
        """Sum over ranks with different rows, take the maximum over ranks with different layers."""
        by_layers: dict[tuple[int, ...], np.ndarray] = {}
        samples = self.baseline.table.sample_ids
        for part in held:
            total = by_layers.setdefault(part.layers, np.zeros(len(samples), np.int64))
            total[np.searchsorted(samples, part.sample_ids)] += part.stray
        return np.max([np.zeros(len(samples), np.int64), *by_layers.values()], axis=0)

    def _set_stray_rows(self, history: Sequence[StepRecord]) -> None:
        """Compare the stray rows of each sample with three measures of the usual number.

        If a fault hits more than the omitted samples, it looks usual among nearly all samples. The
        cleaner half and earlier steps are not affected by it; but if clean samples differ in drift,
        they call those with most drift wrong. So they name only samples whose other rows are as
        usual, which drift never leaves behind; for the rest they ask for a second look.

        Example: 20 of 100 samples of 128 rows have 12 stray ones, the others none. Nearly all:
        15 * 12 / (95 * 128) of the rows are stray, 1.9 a sample, and 12 are not surprising. The
        half: 1 / (50 * 128), 0.02 a sample, and 12 are 37 nats. These samples lost a tenth of their
        information, as much as a tenth of their rows holds.
        """
        rows = self.baseline.table.num_rows
        earlier = [step.stray for step in history]
        upper = self._stray_nats([_clean_stray(self.stray, rows, _FEWEST_SHARE)])
        past = self._stray_nats(earlier, *_STRAY_DRIFT) if earlier else upper
        named = np.maximum(upper, past) - math.log(_STRAY_TESTS)
        nats = self._stray_nats([*earlier, self.record_stray])
        self._set(
            "stray rows", np.where(self._is_else_usual(history), np.maximum(nats, named), nats)
        )
        known = self._stray_nats(earlier) if earlier else upper
        self._set("strict stray rows", np.minimum(upper, known))

    def _stray_nats(
        self, steps: Sequence[tuple[int, int, float, float]], times: float = 1.0, more: float = 0.0
    ) -> Float64[np.ndarray, " samples"]:
        """Return nats of the stray rows of each sample, given those of ``steps``.

        ``times`` those, plus a share ``more`` of all rows, count as usual.
        """
        count, rows = sum(step[0] for step in steps), sum(step[1] for step in steps)
        mean, variance = np.mean([step[2:] for step in steps], axis=0)
        shape = mean**2 / (variance - mean) if variance > mean else 0.5
        due = self.baseline.table.num_rows * (times * (count + 1) / max(rows, 1) + more)
        return excess_nats(self.stray.astype(np.float64), due, float(np.clip(shape, 0.1, 0.5)))

    def _is_else_usual(self, history: Sequence[StepRecord]) -> Bool[np.ndarray, " samples"]:
        """Return which samples lost only the information of their stray rows, within the usual."""
        table = self.baseline.table
        information = table.information()
        cleaner = information[_fewest(self.stray, table.num_rows, _FEWEST_SHARE)]
        low, middle = np.maximum(np.quantile(cleaner, [0.1, 0.5]), 1e-6)
        before = [step.information for step in history] or [0.0]
        lost = 1 - information / max(middle, float(np.mean(before)))
        held = _LOSS_A_STRAY_ROW * self.stray / np.maximum(table.num_rows, 1)
        return np.asarray(lost <= held + 1 - low / middle)

    def _gap_nats(self, gaps: Mapping[int, float] | None) -> Float64[np.ndarray, " samples"]:
        samples = self.baseline.table.sample_ids
        found = np.zeros(len(samples))
        if gaps is None:
            return found
        values = np.array([gaps.get(int(number), np.nan) for number in samples], np.float64)
        values = np.maximum(values, 0.0)  # k3 is negative only by rounding
        known = np.isfinite(values)
        if known.sum() < _MIN_GAPS:
            return found
        for version in np.unique(self.baseline.version_entry):
            own = known & (self.baseline.version_entry == version)
            usual = values[own if own.sum() >= _MIN_GAPS else known]
            found[own] = gap_nats(values[own], usual)
        return found


def _fewest(
    stray: Int64[np.ndarray, " samples"], num_rows: Int64[np.ndarray, " samples"], share: float
) -> Int64[np.ndarray, " chosen"]:
    """Return the entries of the ``share`` of the samples that have the fewest stray rows."""
    order = np.argsort(stray / np.maximum(num_rows, 1), kind="stable")
    return order[: max(1, int(len(order) * share))]


def _clean_stray(
    stray: Int64[np.ndarray, " samples"], num_rows: Int64[np.ndarray, " samples"], share: float
) -> tuple[int, int, float, float]:
    """Return the `StepRecord.stray` of the ``share`` of samples with the fewest stray rows."""
    clean = _fewest(stray, num_rows, share)
    count = stray[clean]
    return int(count.sum()), int(num_rows[clean].sum()), float(count.mean()), float(count.var())


def _is_within(test: str) -> bool:
    return test.endswith(("layer", "window"))


def _rows(tests: Sequence[str]) -> Bool[np.ndarray, " tests"]:
    return np.array([test in tests for test in ALL_TESTS])
