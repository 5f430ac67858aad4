"""Tallies and gap metrics against numbers worked out by hand."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest

from moe_replay.engines.types import FinishReason
from moe_replay.errors import MoeReplayError
from moe_replay.grpo.loss.policy import LossStatistics, step_tally, update_tally
from moe_replay.grpo.metrics import (
    Tally,
    completion_tally,
    engine_gap,
)
from moe_replay.recipe.sections.training import GrpoSection

ROLLOUT = [np.log([0.5, 0.2]), np.log([0.5])]
OLD = [np.log([0.4, 0.6]), np.log([0.8])]
# Token ratios 0.8 and 3 in the first sample, 1.6 in the second; sample ratios 2.4 and 1.6.
BY_HAND = {
    "kl": -math.log(3.84) / 3,
    "k3_kl": (0.8 + 3 + 1.6 - 3 - math.log(3.84)) / 3,
    "ratio_mean": 5.4 / 3,
    "chi2_token": (0.64 + 9 + 2.56) / 3 - 1,
    "chi2_seq": (2.4 + 1.6**2) / 2 - 1,
    "chi2_seq_product": (2.4**2 + 1.6**2) / 2 - 1,
    "extreme_frac_tau_1.1": 3 / 3,
    "extreme_frac_tau_1.5": 2 / 3,
    "extreme_frac_tau_2": 1 / 3,
    "training_log_ppl": (-math.log(0.24) / 2 - math.log(0.8)) / 2,
    "rollout_log_ppl": (-math.log(0.1) / 2 - math.log(0.5)) / 2,
    "training_ppl": (1 / math.sqrt(0.24) + 1.25) / 2,
    "rollout_ppl": (1 / math.sqrt(0.1) + 2) / 2,
    "log_ppl_diff": (-math.log(2.4) / 2 - math.log(1.6)) / 2,
    "log_ppl_abs_diff": (math.log(2.4) / 2 + math.log(1.6)) / 2,
    "log_ppl_diff_max": -math.log(2.4) / 2,
    "log_ppl_diff_min": -math.log(1.6),
    "ppl_ratio": (1 / math.sqrt(2.4) + 1 / 1.6) / 2,
    "ratio_bounded_frac": 0.0,
    "seq_ratio_bounded_frac": 0.0,
}


def test_engine_gap_equals_the_numbers_by_hand() -> None:
    metrics = engine_gap(OLD, ROLLOUT).finish()
    expected = {f"rollout_correction/{name}": value for name, value in BY_HAND.items()}
    assert metrics == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_equal_logprobs_leave_no_gap() -> None:
    metrics = engine_gap(ROLLOUT, ROLLOUT).finish()
    for name in ("kl", "k3_kl", "chi2_token", "chi2_seq", "extreme_frac_tau_1.1", "log_ppl_diff"):
        assert metrics[f"rollout_correction/{name}"] == 0.0
    assert metrics["rollout_correction/ratio_mean"] == 1.0


def test_k3_of_a_tiny_difference_keeps_its_digits() -> None:
    # r - 1 - log r = d^2 / 2 + d^3 / 6 for a small d; computed as it stands it would be 0 or noise.
    difference = 2.0**-26
    metrics = engine_gap([np.array([-1.0 + difference])], [np.array([-1.0])]).finish()
    assert metrics["rollout_correction/k3_kl"] == pytest.approx(difference**2 / 2, rel=1e-6, abs=0)


def test_logprobs_of_the_next_token_show_as_a_gap() -> None:
    shifted = [np.roll(sample, 1) for sample in ROLLOUT]
    metrics = engine_gap(shifted, ROLLOUT).finish()
    # Ratios 0.4 and 2.5 in the first sample: logs cancel.
    assert metrics["rollout_correction/k3_kl"] == pytest.approx((0.4 + 2.5 - 2) / 3, rel=1e-12)


def test_float32_logprobs_are_compared_in_float64() -> None:
    old, rollout = np.float32(-0.7), np.float32(-0.1)
    metrics = engine_gap([np.array([old])], [np.array([rollout])]).finish()
    assert metrics["rollout_correction/kl"] == float(rollout) - float(old)


def test_the_prefix_names_another_gap() -> None:
    assert all(
        name.startswith("live_gap/")
        for name in engine_gap(OLD, ROLLOUT, prefix="live_gap").finish()
    )


def test_a_huge_ratio_is_bounded_and_counted() -> None:
    metrics = engine_gap([np.array([-1.0, -1.0])], [np.array([-900.0, -1.0])]).finish()
    assert metrics["rollout_correction/ratio_bounded_frac"] == 0.5
    assert metrics["rollout_correction/seq_ratio_bounded_frac"] == 1.0
    assert metrics["rollout_correction/ratio_mean"] == pytest.approx((math.exp(20) + 1) / 2)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_logprob_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(MoeReplayError, match=r"metric rollout_correction/kl is (nan|inf)"):
        engine_gap([OLD[0], np.array([bad])], ROLLOUT)


def test_ranks_merge_to_the_whole_batch() -> None:
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    rng = np.random.default_rng(seed)
    old = [rng.normal(-1, 0.5, size=n) for n in (3, 50, 7, 1)]
    rollout = [sample + rng.normal(0, 0.1, size=len(sample)) for sample in old]
    ranks = [engine_gap(old[:1], rollout[:1]), engine_gap(old[1:], rollout[1:])]
    assert Tally.merge(ranks).finish() == pytest.approx(
        engine_gap(old, rollout).finish(), rel=1e-12
    )


def test_a_mean_is_weighted_by_its_counts() -> None:
    left, right = Tally(), Tally()
    left.add_mean("entropy/mean", total=30.0, count=10)
    right.add_mean("entropy/mean", total=1.0, count=1)
    # Not the mean of the ranks' means, which is 2.
    assert Tally.merge([left, right]).finish() == {"entropy/mean": 31 / 11}


def test_a_mean_over_nothing_is_absent() -> None:
    tally = Tally()
    tally.add_mean("kl", total=0.0, count=0)
    assert tally.finish() == {}


def test_minima_maxima_and_sums_merge() -> None:
    left, right = Tally(), Tally()
    for tally, value in ((left, 2.0), (right, 5.0)):
        tally.add_min("low", value)
        tally.add_max("high", value)
        tally.add_sum("loss", value)
    assert Tally.merge([left, right]).finish() == {"high": 5.0, "loss": 7.0, "low": 2.0}


def test_a_tally_travels_between_ranks_to_the_last_bit() -> None:
    tally = engine_gap(OLD, ROLLOUT)
    assert pickle.loads(pickle.dumps(tally)).finish() == tally.finish()


def test_a_number_that_is_not_finite_is_refused() -> None:
    tally = Tally()
    with pytest.raises(MoeReplayError, match="metric loss is nan"):
        tally.add_sum("loss", math.nan)


def test_a_name_tallied_in_two_ways_is_a_bug() -> None:
    tally = Tally()
    tally.add_min("completions/min_length", 3)
    with pytest.raises(AssertionError, match="min and as max"):
        tally.add_max("completions/min_length", 3)


def test_completions_are_counted_by_length_and_ending() -> None:
    stop, length, aborted = FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORTED
    parts = [
        completion_tally([2, 9], [stop, length], overlong_filter=False),
        completion_tally([1, 4], [aborted, stop], overlong_filter=False),
    ]
    assert Tally.merge(parts).finish() == {
        "completions/max_length": 9.0,
        "completions/mean_length": 4.0,
        "completions/min_length": 1.0,
        "completions/clipped_ratio": 0.25,
        "completions/aborted_ratio": 0.25,
        "completions/filtered_ratio": 0.25,
    }


def test_d15_the_overlong_filter_counts_what_it_leaves_out() -> None:
    reasons = [FinishReason.LENGTH, FinishReason.STOP]
    filtered = completion_tally([9, 2], reasons, overlong_filter=True).finish()
    assert filtered["completions/filtered_ratio"] == 0.5


PLAIN, WITH_KL = GrpoSection(), GrpoSection(beta=0.1)


def _statistics(
    *, loss: float, tokens: int, low: int, high: int, kl: float = 0.0
) -> LossStatistics:
    return LossStatistics(
        num_tokens=tokens,
        loss=loss,
        num_clipped_low=low,
        num_clipped_high=high,
        num_bounded=0,
        num_pulled=tokens,
        ratio_sum=float(tokens),
        kl_sum=kl,
        num_off_policy=0,
        num_uncertain=0,
    )


def test_a_step_averages_loss_over_updates_and_clipping_over_tokens() -> None:
    first_rank = update_tally([_statistics(loss=1.0, tokens=10, low=0, high=0)], PLAIN)
    other_rank = update_tally([_statistics(loss=2.0, tokens=30, low=2, high=4)], PLAIN)
    update = Tally.merge([first_rank, other_rank])
    quiet = update_tally([_statistics(loss=0.0, tokens=10, low=0, high=3)], PLAIN)
    assert step_tally([update, quiet]).finish() == {
        "loss": 1.5,
        "policy_ratio/mean": 1.0,
        "policy_ratio/bounded_frac": 0.0,
        "clip_ratio/low_mean": 2 / 50,
        "clip_ratio/low_min": 0.0,
        "clip_ratio/high_mean": 7 / 50,
        "clip_ratio/high_max": 3 / 10,
        "clip_ratio/region_mean": 9 / 50,
    }


def test_kl_is_reported_only_with_a_reference_model() -> None:
    statistics = [_statistics(loss=0.0, tokens=4, low=0, high=0, kl=2.0)]
    assert update_tally(statistics, WITH_KL).finish()["kl"] == 0.5
    assert "kl" not in update_tally(statistics, PLAIN).finish()


def test_an_update_without_trained_tokens_has_no_clip_ratio() -> None:
    update = update_tally([_statistics(loss=0.0, tokens=0, low=0, high=0)], WITH_KL)
    assert step_tally([update]).finish() == {"loss": 0.0}
