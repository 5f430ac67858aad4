"""The policy loss against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from moe_replay.grpo.loss import (
    BatchSize,
    LossInputs,
    LossSettings,
    policy_loss,
    sample_weights,
)

SETTINGS = LossSettings(loss_type="grpo", epsilon=0.2, epsilon_high=0.3, beta=0.0)


def _inputs(new: list[float], **changes: list[float] | None) -> LossInputs:
    values: dict[str, list[float] | None] = {
        "old_logprobs": [0.0] * len(new),
        "ref_logprobs": None,
        "advantages": [1.0] * len(new),
        "weights": [1.0] * len(new),
    }
    values |= changes
    tensors = {k: None if v is None else torch.tensor(v) for k, v in values.items()}
    return LossInputs(new_logprobs=torch.tensor(new, requires_grad=True), **tensors)


def test_loss_of_unchanged_weights_is_minus_the_weighted_advantage() -> None:
    loss, _ = policy_loss(
        _inputs([0.0, 0.0], advantages=[2.0, -1.0], weights=[0.5, 0.25]), SETTINGS
    )
    assert loss.item() == pytest.approx(-2.0 * 0.5 + 1.0 * 0.25)


def test_gradient_of_unchanged_weights_is_minus_weight_times_advantage() -> None:
    inputs = _inputs([0.0, 0.0], advantages=[2.0, -1.0], weights=[0.5, 0.25])
    policy_loss(inputs, SETTINGS)[0].backward()
    assert inputs.new_logprobs.grad is not None
    assert inputs.new_logprobs.grad.tolist() == pytest.approx([-1.0, 0.25])


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "gradient"),
    [
        (1.5, 1.0, -1.3, 0.0),  # clipped above: gain stops at 1 + epsilon_high
        (1.5, -1.0, 1.5, 1.5),  # a bad token that became likelier is never clipped
        (0.5, -1.0, 0.8, 0.0),  # clipped below: 1 - epsilon
        (0.5, 1.0, -0.5, -0.5),
    ],
)
def test_loss_clips_only_where_the_ratio_already_moved_the_right_way(
    ratio: float, advantage: float, expected: float, gradient: float
) -> None:
    inputs = _inputs([math.log(ratio)], advantages=[advantage])
    loss, _ = policy_loss(inputs, SETTINGS)
    loss.backward()
    assert loss.item() == pytest.approx(expected)
    assert inputs.new_logprobs.grad is not None
    assert inputs.new_logprobs.grad.item() == pytest.approx(gradient)


def test_statistics_count_clipped_tokens_by_side_and_leave_untrained_ones_out() -> None:
    inputs = _inputs(
        [math.log(r) for r in (1.5, 0.5, 1.5, 1.0)],
        advantages=[1.0, -1.0, 1.0, 1.0],
        weights=[1.0, 1.0, 0.0, 1.0],
    )
    _, statistics = policy_loss(inputs, SETTINGS)
    assert (statistics.num_tokens, statistics.num_clipped_low, statistics.num_clipped_high) == (
        3,
        1,
        1,
    )
    assert statistics.ratio_sum == pytest.approx(3.0)


def test_kl_term_is_k3_of_new_against_reference() -> None:
    settings = LossSettings(loss_type="grpo", epsilon=0.2, epsilon_high=0.2, beta=0.5)
    difference = math.log(2.0)
    loss, statistics = policy_loss(
        _inputs([0.0], ref_logprobs=[difference], advantages=[0.0]), settings
    )
    k3 = 2.0 - difference - 1.0
    assert loss.item() == pytest.approx(0.5 * k3)
    assert statistics.kl_sum == pytest.approx(k3)


def test_kl_term_vanishes_for_equal_models() -> None:
    settings = LossSettings(loss_type="grpo", epsilon=0.2, epsilon_high=0.2, beta=0.5)
    loss, _ = policy_loss(
        _inputs([-1.0], old_logprobs=[-1.0], ref_logprobs=[-1.0], advantages=[0.0]), settings
    )
    assert loss.item() == 0.0


WHOLE = BatchSize(num_samples=2, num_tokens=6)


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        ("grpo", [1 / (2 * 4), 1 / (2 * 2), 0.0]),
        ("bnpo", [1 / 6, 1 / 6, 0.0]),
        ("dapo", [1 / 6, 1 / 6, 0.0]),
        ("dr_grpo", [1 / (2 * 10), 1 / (2 * 10), 0.0]),
    ],
)
def test_weights_of_each_loss_type_match_their_definition(
    loss_type: str, expected: list[float]
) -> None:
    weights = sample_weights(
        [4, 2, 9],
        [True, True, False],
        loss_type=loss_type,  # type: ignore[arg-type]
        whole=WHOLE,
        max_completion_length=10,
    )
    np.testing.assert_allclose(weights, expected)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo"])
def test_token_weights_of_an_averaging_loss_sum_to_one(loss_type: str) -> None:
    lengths = [4, 2]
    weights = sample_weights(
        lengths,
        [True, True],
        loss_type=loss_type,  # type: ignore[arg-type]
        whole=WHOLE,
        max_completion_length=10,
    )
    assert float(weights @ np.array(lengths)) == pytest.approx(1.0)
