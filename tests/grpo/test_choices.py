"""A loss, like an advantage estimator, is one function in a file and one name in the recipe."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Literal, get_args

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError

from moe_replay.grpo import estimators
from moe_replay.grpo.advantage import group_advantages
from moe_replay.grpo.loss import levels, losses
from moe_replay.grpo.loss.losses import Terms
from moe_replay.grpo.loss.policy import policy_loss
from moe_replay.grpo.loss.rows import BatchSize, TokenRows
from moe_replay.megatron.backward import sum_over_context
from moe_replay.megatron.layout import initialize, shutdown
from moe_replay.recipe.sections.training import GrpoSection, ParallelLayout
from moe_replay.testing.ranks import run_ranks

SIZE = BatchSize(num_samples=2, num_tokens=6, max_completion_length=10)


def named(key: str) -> set[str]:
    """Return the values that a key of ``[grpo]`` takes."""
    return set(get_args(GrpoSection.model_fields[key].annotation))


def defined(module: ModuleType) -> set[str]:
    """Return the functions that a module defines for others."""
    return {
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and name[0] != "_"
    }


@pytest.mark.parametrize(
    ("key", "module"),
    [
        ("loss_type", losses),
        ("importance_sampling_level", levels),
        ("advantage_estimator", estimators),
    ],
)
def test_every_name_has_its_function_and_every_function_its_name(
    key: str, module: ModuleType
) -> None:
    assert named(key) == defined(module) != set()


def test_control_a_function_without_a_name_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = _in(losses, lambda ratio, rows, batch, keys: None)
    monkeypatch.setattr(losses, "scratch", scratch, raising=False)
    assert defined(losses) - named("loss_type") == {"scratch"}


def plain(ratio: torch.Tensor, rows: TokenRows, batch: BatchSize, keys: GrpoSection) -> Terms:
    """Limit no ratio, and add up over tokens: a loss written as any other."""
    never = torch.zeros_like(rows.trains)
    return Terms(
        per_token=-ratio * rows.advantages,
        weights=1 / batch.num_samples,
        low=never,
        high=never,
        is_still=never,
    )


# Samples of 3 and 1 tokens; their mean log ratios are 0.2 and -1.
NEW, OLD, OWNERS = [-1.0, -2.0, -3.0, -4.0], [-1.1, -2.2, -3.3, -3.0], [0, 0, 0, 1]


def held(rows: slice, sum_over_ranks: Callable[[torch.Tensor], torch.Tensor]) -> TokenRows:
    return TokenRows(
        new_logprobs=torch.tensor(NEW[rows], requires_grad=True),
        old_logprobs=torch.tensor(OLD[rows]),
        advantages=torch.tensor([-1.0] * len(NEW[rows])),
        trains=torch.tensor([True] * len(NEW[rows])),
        sample=torch.tensor(OWNERS[rows]),
        lengths=torch.tensor([3.0, 1.0]),
        sum_over_ranks=sum_over_ranks,
    )


def test_a_scratch_loss_is_one_function_and_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Extended(GrpoSection):
        loss_type: Literal["grpo", "plain"] = "grpo"

    monkeypatch.setattr(losses, "plain", plain, raising=False)
    rows = held(slice(4), lambda values: values)
    keys = Extended(loss_type="plain", importance_sampling_level="sequence")
    loss, _ = policy_loss(rows, SIZE, keys)
    loss.backward()
    # Each token pulls with the ratio of its sequence.
    first, second = np.exp(0.2) / 2, np.exp(-1.0) / 2
    assert loss.item() == pytest.approx(3 * first + second)
    assert rows.new_logprobs.grad is not None
    assert rows.new_logprobs.grad.tolist() == pytest.approx([first, first, first, second])
    with pytest.raises(ValidationError, match="loss_type"):
        GrpoSection.model_validate({"loss_type": "plain"})


def _ratios_on_two_ranks() -> tuple[list[float], list[float]]:
    initialize(ParallelLayout(context_parallel_size=2))
    mine = held(slice(0, 1) if dist.get_rank() == 0 else slice(1, 4), sum_over_context)
    log_ratio = levels.sequence(mine)
    log_ratio.exp().sum().backward()
    shutdown()
    assert mine.new_logprobs.grad is not None
    return log_ratio.tolist(), mine.new_logprobs.grad.log().tolist()


@pytest.mark.ranks
def test_a_level_of_sequences_sees_the_rows_of_all_context_parallel_ranks() -> None:
    for first, second in zip(*run_ranks(_ratios_on_two_ranks, 2), strict=True):
        assert first == pytest.approx([0.2])
        assert second == pytest.approx([0.2, 0.2, -1.0])


def test_a_scratch_estimator_is_one_function_and_one_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Extended(GrpoSection):
        advantage_estimator: Literal["grpo", "scratch"] = "grpo"

    monkeypatch.setattr(
        estimators, "scratch", lambda centred, num_counted: 2 * centred, raising=False
    )
    chosen = Extended(advantage_estimator="scratch").advantage_estimator
    found = group_advantages(np.array([[1.0, 0.0]]), scale_rewards="none", estimator=chosen)
    assert found.advantages.tolist() == [[1.0, -1.0]]


def _in(module: ModuleType, function):
    function.__module__ = module.__name__
    return function
