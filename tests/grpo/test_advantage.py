"""Advantages against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moe_replay.errors import RewardError
from moe_replay.grpo.advantage import (
    constant_rewards,
    group_advantages,
    reward_metrics,
)


def test_group_scale_divides_by_the_standard_deviation_with_n_minus_1() -> None:
    result = group_advantages(np.array([[1.0, 2.0, 3.0, 6.0]]), scale_rewards="group")
    # mean 3, squares 4 + 1 + 0 + 9 = 14, variance 14 / 3
    std = math.sqrt(14 / 3)
    expected = [[-2 / (std + 1e-4), -1 / (std + 1e-4), 0, 3 / (std + 1e-4)]]
    np.testing.assert_allclose(result.advantages, expected, rtol=1e-14)
    assert result.reward_std == pytest.approx(std, rel=1e-14)


def test_group_scale_treats_every_group_by_itself() -> None:
    result = group_advantages(np.array([[0.0, 1.0], [0.0, 100.0]]), scale_rewards="group")
    first, second = 0.5 / (math.sqrt(0.5) + 1e-4), 50 / (math.sqrt(5000) + 1e-4)
    np.testing.assert_allclose(result.advantages, [[-first, first], [-second, second]], rtol=1e-14)


def test_batch_scale_divides_all_groups_by_one_standard_deviation() -> None:
    result = group_advantages(np.array([[0.0, 2.0], [4.0, 6.0]]), scale_rewards="batch")
    # All rewards: mean 3, squares 9 + 1 + 1 + 9 = 20, variance 20 / 3
    std = math.sqrt(20 / 3)
    scaled = 1 / (std + 1e-4)
    np.testing.assert_allclose(
        result.advantages, [[-scaled, scaled], [-scaled, scaled]], rtol=1e-14
    )
    assert result.reward_std == pytest.approx(std, rel=1e-14)


def test_no_scale_leaves_the_difference_from_the_group_mean() -> None:
    result = group_advantages(np.array([[1.0, 0.0], [3.0, 7.0]]), scale_rewards="none")
    assert result.advantages.tolist() == [[0.5, -0.5], [-2.0, 2.0]]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_give_exactly_zero(scale: str) -> None:
    # The mean of three times 0.1 is not 0.1 in floating point.
    assert np.full(3, 0.1).mean() != 0.1
    result = group_advantages(np.array([[0.1, 0.1, 0.1], [0.0, 0.5, 1.0]]), scale_rewards=scale)
    assert result.advantages[0].tolist() == [0.0, 0.0, 0.0]
    assert result.equal_rewards.mean() == 0.5
    assert result.advantages[1, 2] > 0


def test_reward_std_is_the_mean_over_groups() -> None:
    result = group_advantages(np.array([[0.0, 2.0], [5.0, 5.0]]), scale_rewards="none")
    assert result.reward_std == pytest.approx(math.sqrt(2) / 2, rel=1e-14)


def test_reward_metrics_hold_every_function() -> None:
    accuracy = np.array([[1.0, 0.0], [1.0, 1.0]])
    result = group_advantages(2 * accuracy, scale_rewards="group")
    metrics = reward_metrics(result, {"accuracy": accuracy})
    assert metrics == {
        "reward": 1.5,
        "reward_std": pytest.approx(math.sqrt(2) / 2),
        "frac_reward_zero_std": 0.5,
        "completions/num_alone": 0.0,
        "rewards/accuracy/none_ratio": 0.0,
        "rewards/accuracy/mean": 0.75,
        # squares 3 / 16 + 9 / 16 = 0.75, variance 0.75 / 3
        "rewards/accuracy/std": pytest.approx(0.5),
    }


def test_t17_rloo_compares_with_the_mean_of_the_others() -> None:
    result = group_advantages(np.array([[3.0, 0.0, 0.0]]), scale_rewards="none", estimator="rloo")
    assert result.advantages.tolist() == [[3.0, -1.5, -1.5]]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
def test_t15_a_completion_that_does_not_count_moves_no_other(scale: str, estimator: str) -> None:
    options = {"scale_rewards": scale, "estimator": estimator}
    alone = group_advantages(np.array([[1.0, 0.0, 4.0], [2.0, 3.0, 7.0]]), **options)
    joined = group_advantages(
        np.array([[1.0, 0.0, -50.0, 4.0], [2.0, 9.0, 3.0, 7.0]]),
        counts=np.array([[True, True, False, True], [True, False, True, True]]),
        **options,
    )
    assert joined.advantages[0, 2] == joined.advantages[1, 1] == 0.0
    kept = np.stack([joined.advantages[0, [0, 1, 3]], joined.advantages[1, [0, 2, 3]]])
    np.testing.assert_allclose(kept, alone.advantages, rtol=1e-14)
    assert joined.reward_std == pytest.approx(alone.reward_std)
    assert reward_metrics(joined, {})["reward"] == pytest.approx(17 / 6)


def test_t15_groups_without_two_completions_that_count_teach_nothing() -> None:
    counts = np.array([[True, False], [False, False]])
    result = group_advantages(
        np.array([[1.0, 0.0], [5.0, 6.0]]), scale_rewards="group", counts=counts
    )
    assert result.advantages.tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert result.equal_rewards.tolist() == [True, True]
    assert result.reward_mean == 1.0
    assert reward_metrics(result, {})["completions/num_alone"] == 1.0
    nothing = group_advantages(
        np.array([[1.0, 0.0]]), scale_rewards="batch", counts=np.zeros((1, 2), dtype=bool)
    )
    assert reward_metrics(nothing, {"f": np.ones((1, 2))}) == {
        "frac_reward_zero_std": 1.0,
        "completions/num_alone": 0.0,
        "rewards/f/none_ratio": 0.0,
    }


def test_d5_constant_rewards_are_those_of_one_score() -> None:
    assert constant_rewards(
        {
            "same": np.array([[0.5, np.nan], [0.5, 0.5]]),
            "differs": np.array([[0.0, 0.0], [0.0, 1.0]]),
            "silent": np.full((2, 2), np.nan),
            "once": np.array([[1.0, np.nan], [np.nan, np.nan]]),
        }
    ) == {"same": 0.5}


def test_d2_scores_that_are_no_opinion_enter_no_mean_and_are_counted() -> None:
    result = group_advantages(np.array([[1.0, 2.0, 3.0, 0.0]]), scale_rewards="none")
    metrics = reward_metrics(result, {"f": np.array([[1.0, np.nan, 3.0, np.nan]])})
    assert metrics["rewards/f/none_ratio"] == 0.5
    assert metrics["rewards/f/mean"] == 2.0
    assert metrics["rewards/f/std"] == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("size", [1e200, 1.7e308])
def test_t12_rewards_whose_squares_overflow_are_refused_by_value(scale: str, size: float) -> None:
    # Divided by an infinite standard deviation they would all become 0, and nothing would be
    # learned.
    with pytest.raises(RewardError, match=r"rewards reach .* \(group 0, completion 1\)"):
        group_advantages(np.array([[0.0, size], [0.0, size]]), scale_rewards=scale)
