"""Statistics of a diagnosis in numpy: means over tokens, intervals over sequences, margins.

In: values of each token, sequence by sequence. Out: means, bootstrap intervals, shares.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64

NUM_RESAMPLES = 2000
"""Bootstrap samples of an interval."""
_AT_ONCE = 1 << 22
# Bins of a margin's decimal logarithm: 100 a decade.
_LOWEST, _HIGHEST, _PER_DECADE = -10.0, 4.0, 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A figure of a diagnosis, with what is known about its error."""

    value: float
    """The figure; nan where nothing was measured."""
    low: float
    """Lower end of the 95 % interval over sequences; nan with fewer than two of them."""
    high: float
    """Upper end of that interval."""

    @property
    def has_interval(self) -> bool:
        """Whether there is an interval."""
        return math.isfinite(self.low) and math.isfinite(self.high)


NOTHING = Estimate(value=math.nan, low=math.nan, high=math.nan)
"""The estimate of what was not measured."""


class TokenSums:
    """Sums of named values over the tokens of each sequence, so that tokens need not be kept.

    All sequences have the same names. Example: values 1, 2, 3 of a first sequence and 6 of a second
    have the mean 12 / 4 = 3, not (2 + 6) / 2.
    """

    def __init__(self) -> None:
        self._names: tuple[str, ...] | None = None
        self._sums: list[list[float]] = []
        self._counts: list[int] = []

    def add(
        self, values: Mapping[str, Float[np.ndarray, " tokens"] | Bool[np.ndarray, " tokens"]]
    ) -> None:
        """Add the tokens of one sequence; one without tokens adds nothing."""
        names = tuple(values)
        assert self._names in (None, names), f"sequences have the values {self._names} and {names}"
        lengths = {len(each) for each in values.values()}
        assert len(lengths) == 1, "every value has the same tokens"
        (length,) = lengths
        self._names = names
        if length:
            self._sums.append([float(np.sum(each, dtype=np.float64)) for each in values.values()])
            self._counts.append(length)

    @property
    def num_tokens(self) -> int:
        """Tokens added."""
        return sum(self._counts)

    @property
    def num_sequences(self) -> int:
        """Sequences with a token."""
        return len(self._counts)

    def sequence_means(self, name: str) -> Float64[np.ndarray, " sequences"]:
        """Return the mean of each sequence with a token, in the order added."""
        assert self._names is not None
        column = self._names.index(name)
        return np.array([sums[column] for sums in self._sums]) / np.array(self._counts)

    def means(self, *, seed: int, num_resamples: int = NUM_RESAMPLES) -> dict[str, Estimate]:
        """Return the mean of each value over all tokens, with its interval over sequences."""
        if self._names is None or not self._counts:
            return {}
        sums, counts = np.array(self._sums), np.array(self._counts, dtype=np.float64)
        drawn = resampled_means(sums, counts, seed=seed, num_resamples=num_resamples)
        means = sums.sum(axis=0) / counts.sum()
        return {
            name: _estimate(float(means[column]), drawn[:, column], len(counts))
            for column, name in enumerate(self._names)
        }

    def removed_share(
        self, before: str, after: str, *, seed: int, num_resamples: int = NUM_RESAMPLES
    ) -> Estimate:
        """Return ``1 - mean(after) / mean(before)`` with its interval, paired by token.

        Both are of the same tokens, and an interval resamples them together. Example: means of 4
        and 1 make 0.75; a mean of 0 before makes nan, since there is nothing to remove.
        """
        if self._names is None or not self._counts:
            return NOTHING
        columns = [self._names.index(before), self._names.index(after)]
        sums, counts = np.array(self._sums)[:, columns], np.array(self._counts, dtype=np.float64)
        total = sums.sum(axis=0)
        drawn = resampled_means(sums, counts, seed=seed, num_resamples=num_resamples)
        with np.errstate(divide="ignore", invalid="ignore"):
            share, drawn_shares = 1 - total[1] / total[0], 1 - drawn[:, 1] / drawn[:, 0]
        return _estimate(float(share), drawn_shares, len(counts))


def resampled_means(
    sums: Float64[np.ndarray, "sequences values"],
    counts: Float64[np.ndarray, " sequences"],
    *,
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
) -> Float64[np.ndarray, "resamples values"]:
    """Return the means over tokens in bootstrap samples of the sequences.

    Tokens of a sequence depend on each other, sequences do not, so sequences are drawn. The same
    seed draws the same ones.
    """
    rng = np.random.default_rng(seed)
    number = len(counts)
    found = []
    step = max(1, _AT_ONCE // number)
    for start in range(0, num_resamples, step):
        size = min(step, num_resamples - start)
        times = rng.multinomial(number, np.full(number, 1 / number), size=size).astype(np.float64)
        found.append((times @ sums) / (times @ counts)[:, None])
    return np.concatenate(found)


def _estimate(
    value: float, drawn: Float64[np.ndarray, " resamples"], num_sequences: int
) -> Estimate:
    held = drawn[np.isfinite(drawn)]
    # One sequence gives the same mean in every sample, and an interval of no width.
    if num_sequences < 2 or not len(held):
        return Estimate(value=value, low=math.nan, high=math.nan)
    low, high = np.quantile(held, [0.025, 0.975])
    return Estimate(value=value, low=float(low), high=float(high))


def bound_of_unseen(num_tokens: int) -> float:
    """Return the share that an event seen in none of ``num_tokens`` may have: 3 / n (95 %).

    (1 - 3/n)^n is about e^-3 = 0.05. Tokens count as independent.
    """
    return min(1.0, 3 / num_tokens) if num_tokens else math.nan


class Margins:
    """How far routers were from choosing otherwise, where routes flip and where they do not.

    The margin of a (token, layer) is the score of the last chosen expert minus that of the first
    one left out. Kept as counts of logarithms, 100 bins a decade, whatever the number of tokens.
    """

    def __init__(self) -> None:
        size = round((_HIGHEST - _LOWEST) * _PER_DECADE) + 1
        self._flipped, self._kept = np.zeros((2, size), dtype=np.int64)

    def add(
        self,
        margins: Float[np.ndarray, "rows layers"],
        flipped: Bool[np.ndarray, "rows layers"],
    ) -> None:
        """Add rows that both recordings hold."""
        found = np.clip(np.log10(np.maximum(margins, 10.0**_LOWEST)), _LOWEST, _HIGHEST)
        bins = np.round((found - _LOWEST) * _PER_DECADE).astype(np.int64)
        self._flipped += np.bincount(bins[flipped], minlength=len(self._flipped))
        self._kept += np.bincount(bins[~flipped], minlength=len(self._kept))

    @property
    def median_flipped(self) -> float:
        """Median margin where routes flip; nan without flips."""
        return _quantile(self._flipped, 0.5)

    @property
    def median_kept(self) -> float:
        """Median margin where both chose the same experts; nan without such."""
        return _quantile(self._kept, 0.5)

    @property
    def near_ties_frac(self) -> float:
        """Share of the flips whose margin is among the smallest tenth of all; nan without flips."""
        total = self._flipped.sum()
        if not total:
            return math.nan
        limit = _bin(self._flipped + self._kept, 0.1)
        return float(self._flipped[: limit + 1].sum() / total)


def _bin(counts: np.ndarray, share: float) -> int:
    """Return the bin in which the cumulated share is reached."""
    return int(np.searchsorted(np.cumsum(counts), share * counts.sum()))


def _quantile(counts: np.ndarray, share: float) -> float:
    if not counts.sum():
        return math.nan
    return 10.0 ** (_LOWEST + _bin(counts, share) / _PER_DECADE)
