"""The policy loss against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from moe_replay.grpo.loss import losses
from moe_replay.grpo.loss.policy import LossStatistics, policy_loss
from moe_replay.grpo.loss.rows import BatchSize, TokenRows, bounded_exp
from moe_replay.grpo.metrics import MAX_LOG_RATIO
from moe_replay.recipe.sections.training import GrpoSection

# Each token weighs 1.
SETTINGS = GrpoSection(loss_type="dapo", epsilon=0.2, epsilon_high=0.3, beta=0.0)
ONE = BatchSize(num_samples=1, num_tokens=1, max_completion_length=1)


def _inputs(new: list[float], **changes: list[float] | None) -> TokenRows:
    values: dict[str, list[float] | None] = {
        "old_logprobs": [0.0] * len(new),
        "ref_logprobs": None,
        "advantages": [1.0] * len(new),
        "trains": [1.0] * len(new),
    }
    values |= changes
    tensors = {k: None if v is None else torch.tensor(v) for k, v in values.items()}
    tensors["trains"] = tensors["trains"].bool()
    return TokenRows(
        new_logprobs=torch.tensor(new, requires_grad=True),
        sample=torch.arange(len(new)),
        lengths=torch.ones(len(new)),
        sum_over_ranks=lambda values: values,
        **tensors,
    )


def test_loss_of_unchanged_weights_is_minus_the_weighted_advantage() -> None:
    loss, _ = policy_loss(
        _inputs([0.0, 0.0], advantages=[2.0, -1.0]),
        BatchSize(num_samples=2, num_tokens=4, max_completion_length=2),
        SETTINGS,
    )
    assert loss.item() == pytest.approx((-2.0 + 1.0) / 4)


def test_gradient_of_unchanged_weights_is_minus_weight_times_advantage() -> None:
    inputs = _inputs([0.0, 0.0], advantages=[2.0, -1.0])
    size = BatchSize(num_samples=2, num_tokens=4, max_completion_length=2)
    policy_loss(inputs, size, SETTINGS)[0].backward()
    assert inputs.new_logprobs.grad is not None
    assert inputs.new_logprobs.grad.tolist() == pytest.approx([-0.5, 0.25])


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
    loss, _ = policy_loss(inputs, ONE, SETTINGS)
    loss.backward()
    assert loss.item() == pytest.approx(expected)
    assert inputs.new_logprobs.grad is not None
    assert inputs.new_logprobs.grad.item() == pytest.approx(gradient)


def test_statistics_count_clipped_tokens_by_side_and_leave_untrained_ones_out() -> None:
    inputs = _inputs(
        [math.log(r) for r in (1.5, 0.5, 1.5, 1.0)],
        advantages=[1.0, -1.0, 1.0, 1.0],
        trains=[1.0, 1.0, 0.0, 1.0],
    )
    _, statistics = policy_loss(inputs, ONE, SETTINGS)
    assert (statistics.num_tokens, statistics.num_clipped_low, statistics.num_clipped_high) == (
        3,
        1,
        1,
    )
    assert statistics.ratio_sum == pytest.approx(3.0)


def test_kl_term_is_k3_of_new_against_reference() -> None:
    settings = GrpoSection(loss_type="dapo", epsilon=0.2, epsilon_high=0.2, beta=0.5)
    difference = math.log(2.0)
    loss, statistics = policy_loss(
        _inputs([0.0], ref_logprobs=[difference], advantages=[0.0]), ONE, settings
    )
    k3 = 2.0 - difference - 1.0
    assert loss.item() == pytest.approx(0.5 * k3)
    assert statistics.kl_sum == pytest.approx(k3)


def test_kl_term_vanishes_for_equal_models() -> None:
    settings = GrpoSection(loss_type="dapo", epsilon=0.2, epsilon_high=0.2, beta=0.5)
    loss, _ = policy_loss(
        _inputs([-1.0], old_logprobs=[-1.0], ref_logprobs=[-1.0], advantages=[0.0]), ONE, settings
    )
    assert loss.item() == 0.0


CISPO = GrpoSection(epsilon_high=2.0)
SIZE = BatchSize(num_samples=2, num_tokens=6, max_completion_length=10)


def _weights(loss_type: str, lengths: list[int]) -> list[float]:
    """Return the weight of a token of each sample."""
    owners = [number for number, length in enumerate(lengths) for _ in range(length)]
    rows = TokenRows(
        new_logprobs=torch.zeros(sum(lengths)),
        old_logprobs=torch.zeros(sum(lengths)),
        advantages=torch.ones(sum(lengths)),
        trains=torch.ones(sum(lengths), dtype=torch.bool),
        sample=torch.tensor(owners),
        lengths=torch.tensor(lengths, dtype=torch.float32),
        sum_over_ranks=lambda values: values,
    )
    weights = getattr(losses, loss_type)(rows.log_ratio.exp(), rows, SIZE, CISPO).weights
    every = (torch.ones(sum(lengths)) * weights).tolist()
    assert every == [every[owners.index(owner)] for owner in owners]
    return [every[owners.index(number)] for number in range(len(lengths))]


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        ("grpo", [1 / (2 * 4), 1 / (2 * 2)]),
        ("bnpo", [1 / 6, 1 / 6]),
        ("dapo", [1 / 6, 1 / 6]),
        ("dr_grpo", [1 / (2 * 10), 1 / (2 * 10)]),
        ("sapo", [1 / (2 * 4), 1 / (2 * 2)]),
        ("cispo", [1 / 6, 1 / 6]),
        ("dppo", [1 / 6, 1 / 6]),
    ],
)
def test_weights_of_each_loss_type_match_their_definition(
    loss_type: str, expected: list[float]
) -> None:
    assert _weights(loss_type, [4, 2]) == pytest.approx(expected)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "cispo", "sapo", "dppo"])
def test_token_weights_of_an_averaging_loss_sum_to_one(loss_type: str) -> None:
    first, second = _weights(loss_type, [4, 2])
    assert 4 * first + 2 * second == pytest.approx(1.0)


WITH_KL = GrpoSection(loss_type="dapo", epsilon=0.2, epsilon_high=0.3, beta=0.1)
FAR = [100.0, 1e4, math.inf, math.nan]


def _run(inputs: TokenRows, settings: GrpoSection) -> tuple[float, list[float], LossStatistics]:
    loss, statistics = policy_loss(inputs, ONE, settings)
    loss.backward()
    assert inputs.new_logprobs.grad is not None
    return loss.item(), inputs.new_logprobs.grad.tolist(), statistics


@pytest.mark.parametrize("far", FAR)
def test_t12_a_token_without_weight_has_gradient_zero_whatever_its_ratio(far: float) -> None:
    inputs = _inputs([far, 0.0], trains=[0.0, 1.0], ref_logprobs=[-far, 0.0])
    loss, gradient, statistics = _run(inputs, WITH_KL)
    assert (loss, gradient) == (-1.0, [0.0, -1.0])
    assert (statistics.ratio_sum, statistics.kl_sum, statistics.num_bounded) == (1.0, 0.0, 0)


@pytest.mark.parametrize("far", [100.0, 1e4])
def test_t12_a_clipped_token_has_gradient_zero_whatever_its_ratio(far: float) -> None:
    loss, gradient, statistics = _run(_inputs([far, 0.0]), SETTINGS)
    assert gradient == [0.0, -1.0]
    assert loss == pytest.approx(-1.3 - 1.0)
    assert (statistics.num_clipped_high, statistics.num_bounded) == (1, 1)
    assert statistics.ratio_sum == pytest.approx(math.exp(MAX_LOG_RATIO) + 1, rel=1e-6)


@pytest.mark.parametrize("far", [25.0, 100.0, 1e4])
def test_t12_far_tokens_that_are_not_clipped_keep_a_finite_pull_in_the_right_direction(
    far: float,
) -> None:
    # A bad token that became likelier is pushed down; a token that the reference thinks likelier is
    # pulled up.
    _, (pushed,), _ = _run(_inputs([far], advantages=[-1.0]), SETTINGS)
    assert pushed == pytest.approx(math.exp(MAX_LOG_RATIO), rel=1e-6)
    _, (pulled,), statistics = _run(_inputs([0.0], advantages=[0.0], ref_logprobs=[far]), WITH_KL)
    assert pulled == pytest.approx(-0.1 * (math.exp(MAX_LOG_RATIO) - 1), rel=1e-6)
    assert math.isfinite(statistics.kl_sum)
    assert statistics.num_bounded == 1


def test_t12_ratios_within_the_bound_are_those_of_the_plain_formula_to_the_last_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(2000, generator=generator) * 40 - 20
    assert torch.equal(bounded_exp(spread), torch.exp(spread))
    new, plain = (spread.clone().requires_grad_(True) for _ in range(2))
    advantages = torch.randn(2000, generator=generator)
    old = torch.zeros(2000)
    inputs = TokenRows(
        new_logprobs=new,
        old_logprobs=old,
        ref_logprobs=old,
        advantages=advantages,
        trains=torch.ones(2000, dtype=torch.bool),
        sample=torch.arange(2000),
        lengths=torch.ones(2000),
        sum_over_ranks=lambda values: values,
    )
    policy_loss(inputs, ONE, WITH_KL)[0].backward()
    ratio = torch.exp(plain - old)
    surrogate = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.3) * advantages)
    k3 = torch.exp(old - plain) - (old - plain) - 1
    (surrogate + 0.1 * k3).sum().backward()
    assert new.grad is not None
    assert plain.grad is not None
    assert torch.equal(new.grad, plain.grad)


def test_tokens_that_pull_are_neither_clipped_nor_certain_nor_without_advantage() -> None:
    inputs = _inputs(
        [-1.0, -1.0, -1.0, 0.0, -1.0],
        old_logprobs=[-1.0, -2.0, -1.0, 0.0, -1.0],
        advantages=[1.0, 1.0, 0.0, 1.0, 1.0],
        trains=[1.0, 1.0, 1.0, 1.0, 0.0],
    )
    assert policy_loss(inputs, ONE, SETTINGS)[1].num_pulled == 1
