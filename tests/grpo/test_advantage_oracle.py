"""Advantage estimators against plain loops over groups, and against worked numbers.

The worked numbers come from other trainers' own functions on the same rewards: two groups of two
completions, with the rewards (1, 0) and (1, 1).
"""

from __future__ import annotations

import itertools
import math
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from moe_replay.errors import RecipeError
from moe_replay.grpo.advantage import equal_rewards, gdpo_advantages, group_advantages
from moe_replay.recipe.sections.training import GrpoSection

from .smallest_recipe import problems_of, recipe

WORKED = np.array([[1.0, 0.0], [1.0, 1.0]])
SCALES = ("group", "batch", "none")
ESTIMATORS = get_args(GrpoSection.model_fields["advantage_estimator"].annotation)
SHAPE = st.tuples(st.integers(1, 4), st.integers(2, 5))


@pytest.mark.parametrize(
    ("estimator", "scale", "first"),
    [
        ("grpo", "group", 0.707007),
        ("grpo", "batch", 0.999800),
        ("grpo", "none", 0.5),
        ("rloo", "none", 1.0),
        ("rloo", "group", 1.414014),
        ("reinforce_plus_plus", "batch", 1.224445),
        ("reinforce_plus_plus", "group", 0.707007),
    ],
)
def test_worked_numbers(estimator: str, scale: str, first: float) -> None:
    found = group_advantages(WORKED, scale_rewards=scale, estimator=estimator).advantages
    assert found[0].tolist() == pytest.approx([first, -first], abs=5e-7)
    assert found[1].tolist() == [0.0, 0.0]


def plain(rewards, counts, estimator: str, scale: str) -> list[list[float]]:
    """Work advantages out group by group, in Python's own arithmetic."""
    raw, groups = [], []
    for row, kept in zip(rewards.tolist(), counts.tolist(), strict=True):
        mine = [r for r, k in zip(row, kept, strict=True) if k]
        groups.append(mine)
        line = []
        for number, reward in enumerate(row):
            others = [r for n, r in enumerate(row) if kept[n] and n != number]
            base = others if estimator == "rloo" else mine
            line.append(reward - math.fsum(base) / len(base) if kept[number] and others else 0.0)
        raw.append(line)

    def std(values: list[float]) -> float:
        mean = math.fsum(values) / len(values) if values else 0.0
        return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / max(1, len(values) - 1))

    flat = [r for mine in groups for r in mine]
    if estimator == "reinforce_plus_plus":
        flat = np.array(raw)[counts].tolist()
    out = []
    for line, mine in zip(raw, groups, strict=True):
        by = {"group": std(mine) + 1e-4, "batch": std(flat) + 1e-4, "none": 1.0}[scale]
        out.append([a / by if len(set(mine)) > 1 else 0.0 for a in line])
    return out


@st.composite
def batches(draw) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(SHAPE)
    size = shape[0] * shape[1]
    values = st.sampled_from([0.0, 0.1, 0.35, 0.95, 1.0, -2.5, 7.0])
    rewards = np.array(draw(st.lists(values, min_size=size, max_size=size))).reshape(shape)
    counts = np.array(draw(st.lists(st.booleans(), min_size=size, max_size=size))).reshape(shape)
    return rewards, counts


@settings(max_examples=40)
@given(batches())
def test_estimators_agree_with_plain_loops(batch) -> None:
    rewards, counts = batch
    note(f"{rewards}, {counts}")
    for estimator, scale in itertools.product(ESTIMATORS, SCALES):
        found = group_advantages(rewards, scale_rewards=scale, estimator=estimator, counts=counts)
        expected = plain(rewards, counts, estimator, scale)
        np.testing.assert_allclose(found.advantages, expected, rtol=1e-9, atol=1e-11)
        for group, (row, kept) in enumerate(zip(rewards, counts, strict=True)):
            is_equal = len(set(row[kept].tolist())) < 2
            assert found.equal_rewards[group] == is_equal
            if is_equal:
                assert found.advantages[group].tolist() == [0.0] * len(row)


def test_control_the_plain_loops_tell_estimators_and_scales_apart() -> None:
    rewards, counts = np.array([[1.0, 0.0, 4.0], [2.0, 2.5, 0.0]]), np.ones((2, 3), dtype=bool)
    every = [plain(rewards, counts, e, s) for e in ESTIMATORS for s in SCALES]
    # REINFORCE++ differs from GRPO in the spread of a batch alone.
    assert len({str(each) for each in every}) == 7


@settings(max_examples=40)
@given(batches(), st.integers(0, 2**32 - 1))
def test_groups_are_rows_whatever_their_order(batch, seed: int) -> None:
    rewards, counts = batch
    order = np.random.default_rng(seed).permutation(len(rewards))
    for estimator, scale in itertools.product(ESTIMATORS, SCALES):
        options = {"scale_rewards": scale, "estimator": estimator}
        straight = group_advantages(rewards, counts=counts, **options).advantages
        mixed = group_advantages(rewards[order], counts=counts[order], **options).advantages
        np.testing.assert_allclose(mixed, straight[order], rtol=1e-9, atol=1e-11)


def test_seven_scores_of_a_tenth_are_equal_and_one_bit_more_is_not() -> None:
    same = np.full((1, 7), 0.35)
    every = np.ones((1, 7), dtype=bool)
    assert equal_rewards(same, every).tolist() == [True]
    other = same.copy()
    other[0, 3] = np.nextafter(0.35, 1)
    assert equal_rewards(other, every).tolist() == [False]
    every[0, 3] = False
    assert equal_rewards(other, every).tolist() == [True]


FIRST, SECOND = np.array([[1.0, 0.0], [1.0, 1.0]]), np.array([[0.0, 2.0], [0.0, 4.0]])


def test_gdpo_worked_numbers() -> None:
    every = np.ones((2, 2), dtype=bool)
    found = gdpo_advantages({"a": FIRST, "b": SECOND}, {"a": 1.0, "b": 0.5}, counts=every)
    expected = [[0.865737, -0.865737], [-0.865890, 0.865890]]
    np.testing.assert_allclose(found.advantages, expected, atol=5e-7)
    assert found.equal_rewards.tolist() == [False, False]
    # The sum of both says nothing about the first group.
    summed = group_advantages(FIRST + 0.5 * SECOND, scale_rewards="group")
    np.testing.assert_allclose(summed.advantages, [[0, 0], [-0.707057, 0.707057]], atol=5e-7)
    assert found.reward_mean == summed.reward_mean == 1.5


def gdpo_of(scores: list[np.ndarray], weights: list[float], counts: np.ndarray) -> np.ndarray:
    """Work GDPO out one completion at a time."""
    sums = np.zeros(counts.shape)
    for given_scores, weight in zip(scores, weights, strict=True):
        for group, row in enumerate(given_scores):
            at = [n for n, value in enumerate(row) if counts[group, n] and not math.isnan(value)]
            values = [row[n] for n in at]
            if len(set(values)) > 1:
                mean = sum(values) / len(values)
                std = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
                for n in at:
                    sums[group, n] += weight * (row[n] - mean) / (std + 1e-4)
    flat = sums[counts]
    spread = (
        0.0 if len(flat) < 2 else math.sqrt(((flat - flat.mean()) ** 2).sum() / (len(flat) - 1))
    )
    return sums / (spread + 1e-4)


@settings(max_examples=40)
@given(batches(), st.integers(0, 2**32 - 1))
def test_gdpo_agrees_with_a_plain_loop_where_some_have_no_opinion(batch, seed: int) -> None:
    first, counts = batch
    rng = np.random.default_rng(seed)
    second = np.where(
        rng.random(first.shape) < 0.3, np.nan, rng.choice([0.0, 0.5, 2.0], first.shape)
    )
    weights = {"a": 1.0, "b": -0.7}
    found = gdpo_advantages({"a": first, "b": second}, weights, counts=counts).advantages
    expected = gdpo_of([first, second], [1.0, -0.7], counts)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_gdpo_gives_exactly_zero_where_every_function_is_constant_in_the_group() -> None:
    rng = np.random.default_rng(3)
    first, second = rng.random((6, 3)), rng.random((6, 3))
    first[2], second[2] = 0.1, 0.7
    second[2, 1] = np.nan
    every = np.ones((6, 3), dtype=bool)
    found = gdpo_advantages({"a": first, "b": second}, {"a": 1.0, "b": 3.0}, counts=every)
    assert found.advantages[2].tolist() == [0.0, 0.0, 0.0]
    assert found.equal_rewards.tolist() == [False, False, True, False, False, False]
    # One function alone that differs is enough, unless its weight is 0.
    second[2, 0] = 0.8
    for weight, is_equal in ((3.0, False), (0.0, True)):
        weights = {"a": 1.0, "b": weight}
        again = gdpo_advantages({"a": first, "b": second}, weights, counts=every)
        assert bool(again.equal_rewards[2]) == is_equal
        assert (again.advantages[2] == 0).all() == is_equal


def test_scale_follows_the_estimator_as_in_megatron_swift() -> None:
    found = {name: recipe(grpo={"advantage_estimator": name}).grpo for name in ESTIMATORS}
    assert {name: grpo.scale_rewards for name, grpo in found.items()} == {
        "grpo": "group",
        "rloo": "none",
        "reinforce_plus_plus": "batch",
    }
    asked = recipe(grpo={"advantage_estimator": "rloo", "scale_rewards": "group"})
    assert asked.grpo.scale_rewards == "group"
    wrong = problems_of(grpo={"advantage_estimator": "reinforce"})
    assert "grpo.advantage_estimator" in wrong and "1 problem" in wrong


def test_gdpo_goes_with_no_other_estimator() -> None:
    assert recipe(grpo={"scale_rewards": "gdpo"}).grpo.scale_rewards == "gdpo"
    with pytest.raises(RecipeError, match=r"grpo.scale_rewards: 'gdpo' with advantage_estimator"):
        recipe(grpo={"scale_rewards": "gdpo", "advantage_estimator": "rloo"})
