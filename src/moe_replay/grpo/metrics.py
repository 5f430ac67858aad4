"""Metrics that ranks can add up: each tallies its own tokens, merged they are the batch's."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

from moe_replay.engines.types import FinishReason
from moe_replay.errors import MoeReplayError
from moe_replay.tasks.rewards.rewards import ScoredBatch

Kind = Literal["mean", "sum", "min", "max"]

_COMBINE: dict[Kind, Callable[[float, float], float]] = {
    "mean": operator.add,
    "sum": operator.add,
    "min": min,
    "max": max,
}

EXTREME_TAUS = (1.1, 1.5, 2.0)
"""Factors of ``extreme_frac_tau_*``."""

MAX_LOG_RATIO = 20.0
"""Maximum log ratio that is exponentiated, so that one broken token cannot overflow a sum."""


class Tally:
    """Means, sums, minima and maxima by metric name, which ranks gather and merge.

    >>> left, right = Tally(), Tally()
    >>> left.add_mean("reward", total=3.0, count=3)
    >>> right.add_mean("reward", total=0.0, count=1)
    >>> Tally.merge([left, right]).finish()
    {'reward': 0.75}
    """

    __slots__ = ("_entries",)

    def __init__(self) -> None:
        self._entries: dict[str, tuple[Kind, float, int]] = {}

    def add_mean(self, name: str, *, total: float, count: int = 1) -> None:
        """Add ``count`` items whose values sum to ``total``; `finish` omits a mean over no items.

        Raises:
            MoeReplayError: when the number is not finite, as in every ``add``.
        """
        assert count > 0 or (count == 0 and total == 0), f"{name}: {total} from {count} items"
        self._add(name, "mean", total, count)

    def add_sum(self, name: str, value: float) -> None:
        """Add a part of a sum over microbatches and ranks."""
        self._add(name, "sum", value, 1)

    def add_min(self, name: str, value: float) -> None:
        """Keep the smallest value."""
        self._add(name, "min", value, 1)

    def add_max(self, name: str, value: float) -> None:
        """Keep the largest value."""
        self._add(name, "max", value, 1)

    @staticmethod
    def merge(parts: Iterable[Tally]) -> Tally:
        """Combine tallies; the same parts in the same order give the same bits."""
        merged = Tally()
        for part in parts:
            for name, (kind, value, count) in part._entries.items():
                merged._add(name, kind, value, count)
        return merged

    def finish(self) -> dict[str, float]:
        """Return the value of every metric that has one, sorted by name."""
        return {
            name: value / count if kind == "mean" else value
            for name, (kind, value, count) in sorted(self._entries.items())
            if count
        }

    def _add(self, name: str, kind: Kind, value: float, count: int) -> None:
        if not math.isfinite(value):
            raise MoeReplayError(
                f"metric {name} is {value}, expected a finite number; training has probably diverged "
                "or a log-probability is broken: look at grad_norm and rollout_correction/* of the "
                "steps before"
            )
        value, count = float(value), int(count)
        if name in self._entries:
            old_kind, old_value, old_count = self._entries[name]
            assert old_kind == kind, f"{name} is tallied as {old_kind} and as {kind}"
            value, count = _COMBINE[kind](old_value, value), old_count + count
        self._entries[name] = (kind, value, count)


def engine_gap(
    old_logprobs: Sequence[Float[np.ndarray, " _"]],
    rollout_logprobs: Sequence[Float[np.ndarray, " _"]],
    *,
    prefix: str = "rollout_correction",
) -> Tally:
    """Tally how far the trainer's probabilities of sampled tokens are from the engine's.

    Both take one array per sample. With ``r = exp(old - rollout)`` of a token and ``m`` the mean
    log-probability of a sample's tokens:

    - over tokens: ``kl`` mean(-log r), ``k3_kl`` mean(r - 1 - log r), ``ratio_mean`` mean(r),
      ``chi2_token`` mean(r^2) - 1, ``extreme_frac_tau_<tau>`` fraction with max(r, 1/r) > tau;
    - over samples: ``{training,rollout}_log_ppl`` mean(-m), ``{training,rollout}_ppl``
      mean(exp(-m)), ``log_ppl_{diff,abs_diff,diff_max,diff_min}`` of m_rollout - m_training,
      ``ppl_ratio`` its mean exp, ``chi2_seq`` mean((geometric mean of r)^2) - 1 and
      ``chi2_seq_product`` mean((product of r)^2) - 1.

    Exponentials use log ratios of at most `MAX_LOG_RATIO`; ``ratio_bounded_frac`` (tokens) and
    ``seq_ratio_bounded_frac`` (samples) say how often. A sample without a token, aborted before its
    first, has no gap.

    Source: k3, J. Schulman, "Approximating KL divergence"; F(tau), arXiv 2510.11370; ``chi2_seq``,
    Megatron-SWIFT; the other names and their averaging, verl, ``compute_offpolicy_metrics``, whose
    ``chi2_seq`` is the product's.
    """
    tally = Tally()
    for number, (old, rollout) in enumerate(zip(old_logprobs, rollout_logprobs, strict=True)):
        assert len(old) == len(rollout), f"sample {number}: {len(old)} and {len(rollout)} values"
        if len(old) == 0:
            continue
        _tally_tokens(tally, prefix, old.astype(np.float64) - rollout.astype(np.float64))
        _tally_sample(tally, prefix, old.astype(np.float64), rollout.astype(np.float64))
    return tally


def gap_of_tokens(log_ratio: Float[np.ndarray, " tokens"]) -> dict[str, np.ndarray]:
    """Return what `engine_gap` means over tokens, of each token, by name without a prefix.

    ``log_ratio`` is the trainer's log-probability of a sampled token minus the engine's.
    """
    bounded = np.minimum(log_ratio, MAX_LOG_RATIO)
    per_token = {
        "kl": -log_ratio,
        # expm1 keeps the small differences that r - 1 - log r would lose to rounding.
        "k3_kl": np.expm1(bounded) - log_ratio,
        "ratio_mean": np.exp(bounded),
        "chi2_token": np.expm1(2 * bounded),
        "ratio_bounded_frac": log_ratio > MAX_LOG_RATIO,
    }
    for tau in EXTREME_TAUS:
        per_token[f"extreme_frac_tau_{tau:g}"] = np.abs(log_ratio) > math.log(tau)
    return per_token


def _tally_tokens(tally: Tally, prefix: str, log_ratio: np.ndarray) -> None:
    for name, values in gap_of_tokens(log_ratio).items():
        tally.add_mean(f"{prefix}/{name}", total=float(values.sum()), count=len(log_ratio))


def _tally_sample(tally: Tally, prefix: str, old: np.ndarray, rollout: np.ndarray) -> None:
    training_log_ppl, rollout_log_ppl = -float(old.mean()), -float(rollout.mean())
    difference = training_log_ppl - rollout_log_ppl
    log_ratio = float((old - rollout).sum())
    per_sample = {
        "training_log_ppl": training_log_ppl,
        "rollout_log_ppl": rollout_log_ppl,
        "training_ppl": _perplexity(training_log_ppl),
        "rollout_ppl": _perplexity(rollout_log_ppl),
        "log_ppl_diff": difference,
        "log_ppl_abs_diff": abs(difference),
        "ppl_ratio": math.exp(min(difference, MAX_LOG_RATIO)),
        "chi2_seq": math.expm1(2 * min(-difference, MAX_LOG_RATIO)),
        "chi2_seq_product": math.expm1(2 * min(log_ratio, MAX_LOG_RATIO)),
        "seq_ratio_bounded_frac": float(log_ratio > MAX_LOG_RATIO),
    }
    for name, value in per_sample.items():
        tally.add_mean(f"{prefix}/{name}", total=value)
    tally.add_max(f"{prefix}/log_ppl_diff_max", difference)
    tally.add_min(f"{prefix}/log_ppl_diff_min", difference)


def function_tally(batch: ScoredBatch, prefix: str = "") -> Tally:
    """Tally ``rewards/<function>/failed_ratio`` of tolerated failures, and what functions log."""
    tally = Tally()
    for name, gone in batch.failed.items():
        tally.add_mean(
            f"{prefix}rewards/{name}/failed_ratio", total=int(gone.sum()), count=len(gone)
        )
    for name, (total, count) in batch.logged.items():
        tally.add_mean(f"{prefix}logged/{name}", total=total, count=count)
    return tally


def _perplexity(log_perplexity: float) -> float:
    # A sum of larger exponentials would overflow; the log perplexity still shows such a sample.
    return math.exp(min(log_perplexity, 300.0))


def completion_tally(
    lengths: Sequence[int], reasons: Sequence[FinishReason], *, overlong_filter: bool
) -> Tally:
    """Tally ``completions/{mean,min,max}_length`` in sampled tokens, and how completions ended.

    ``completions/clipped_ratio`` were cut at the length limit, ``completions/aborted_ratio`` given
    up by the engine, and ``completions/filtered_ratio`` are those of both that the loss omits.
    Source of the names: TRL, ``GRPOTrainer``.
    """
    tally = Tally()
    for length, reason in zip(lengths, reasons, strict=True):
        clipped, aborted = reason is FinishReason.LENGTH, reason is FinishReason.ABORTED
        tally.add_mean("completions/mean_length", total=length)
        tally.add_min("completions/min_length", length)
        tally.add_max("completions/max_length", length)
        tally.add_mean("completions/clipped_ratio", total=clipped)
        tally.add_mean("completions/aborted_ratio", total=aborted)
        filtered = aborted or (clipped and overlong_filter)
        tally.add_mean("completions/filtered_ratio", total=filtered)
    return tally
