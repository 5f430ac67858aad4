"""Failures of reward functions that a run tolerates, and what they get beside columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_replay.errors import RewardError
from moe_replay.recipe.sections.run import RewardSection
from moe_replay.tasks.encoding import Prompt
from moe_replay.tasks.rewards.builtin import soft_overlong
from moe_replay.tasks.rewards.rewards import RewardSet, ScoredBatch

CODE = """
import asyncio, os, time

def length(completions): return [float(len(text)) for text in completions]

def fails_on_b(completions):
    if "b" in completions: raise ValueError("b is bad")
    return [float(len(text)) for text in completions]

async def async_fails_on_b(completions):
    await asyncio.sleep(0)
    return fails_on_b(completions)

def ends_on_b(completions):
    if "b" in completions: os._exit(3)
    return [1.0] * len(completions)

def none_on_b(completions): return ["x" if text == "b" else 2.0 for text in completions]

def hangs(completions): time.sleep(60)

def logs(completions, trainer_state, log_metric):
    for text in completions: log_metric("length", len(text))
    return [trainer_state.global_step / trainer_state.max_steps] * len(completions)

def takes_all(completions, **rest): return [float(len(rest))] * len(completions)

def logs_nan(completions, log_metric):
    log_metric("broken", float("nan"))
    return [0.0] * len(completions)
"""


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Callable[..., RewardSet]]:
    (tmp_path / "own.py").write_text(CODE)
    opened: list[RewardSet] = []

    def load(**functions: dict[str, Any]) -> RewardSet:
        specs = [
            RewardSection(function=f"{tmp_path / 'own.py'}:{name}", **keys)
            for name, keys in functions.items()
        ]
        opened.append(RewardSet.load(specs))
        return opened[-1]

    yield load
    for each in opened:
        each.close()


def score(rewards: RewardSet, texts: str, **keys: Any) -> ScoredBatch:
    """Score one completion a letter."""
    ids = np.array([1], dtype=np.int32)
    prompts = [Prompt(index=n, text="p", prompt_ids=ids, columns={}) for n in range(len(texts))]
    return rewards.score(prompts, list(texts), [[1]] * len(texts), **keys)


@pytest.mark.parametrize("name", ["fails_on_b", "async_fails_on_b", "none_on_b", "ends_on_b"])
@pytest.mark.parametrize(("policy", "given"), [("drop", np.nan), ("zero", 0.0)])
def test_only_the_completions_on_which_a_function_fails_lose_their_score(
    load: Callable[..., RewardSet], name: str, policy: str, given: float
) -> None:
    found = score(load(length={}, **{name: {"on_failure": policy}}), "abcab")
    failed = [False, True, False, False, True]
    assert found.failed[name].tolist() == failed and set(found.failed) == {name}
    good = 2.0 if name == "none_on_b" else 1.0
    expected = [given if gone else good for gone in failed]
    np.testing.assert_array_equal(found.scores[name], expected)
    # The other function keeps its scores, also where it stood beside one that ended the process.
    assert found.scores["length"].tolist() == [1.0] * 5
    # Dropped, a completion has no reward: its length alone would be a low one.
    less = np.nan if policy == "drop" else 1.0
    np.testing.assert_array_equal(found.total, [less if f else 1 + good for f in failed])
    assert len(found.notes) == 1 and name in found.notes[0]


def test_control_a_failure_stops_the_run_unless_it_is_tolerated(
    load: Callable[..., RewardSet],
) -> None:
    with pytest.raises(RewardError, match=r"fails_on_b .* raised ValueError: b is bad"):
        score(load(fails_on_b={}), "ab")
    both = load(ends_on_b={"on_failure": "drop"}, fails_on_b={})
    with pytest.raises(RewardError, match=r"fails_on_b .* raised ValueError"):
        score(both, "ab")
    fine = score(load(fails_on_b={"on_failure": "zero"}), "aa")
    assert not fine.failed["fails_on_b"].any() and fine.notes == []


def test_a_late_function_loses_its_batch_and_the_next_one_is_scored(
    load: Callable[..., RewardSet],
) -> None:
    rewards = load(length={}, hangs={"on_failure": "drop", "timeout_s": 0.5})
    found = score(rewards, "ab")
    assert found.failed["hangs"].tolist() == [True, True]
    assert np.isnan(found.total).all()
    assert "was still running after 0.5 s" in found.notes[0]


def test_functions_that_name_them_get_the_state_and_a_log(load: Callable[..., RewardSet]) -> None:
    rewards = load(logs={}, takes_all={})
    found = score(rewards, "abcd", state=(3, 12))
    assert found.scores["logs"].tolist() == [0.25] * 4
    assert found.logged == {"length": (4.0, 4)}
    # Prompts and ids: what **kwargs got before.
    assert found.scores["takes_all"].tolist() == [2.0] * 4
    assert score(rewards, "a", state=(1, 4)).logged == {"length": (1.0, 1)}
    with pytest.raises(RewardError, match="log_metric got broken = nan"):
        score(load(logs_nan={}), "a")


def test_soft_overlong_falls_to_minus_one_and_no_lower() -> None:
    ids = [[7] * length for length in (0, 16, 17, 18, 20, 25)]
    found = soft_overlong([""] * 6, completion_ids=ids, soft_max_length=20, soft_cache_length=4)
    assert found == [0, 0, -0.25, -0.5, -1, -1]


def test_soft_overlong_refuses_a_cache_that_cannot_be() -> None:
    # Built-ins are called on nothing at the start, where that is an error of the recipe.
    for cache in (0, 24):
        with pytest.raises(ValueError, match="0 < soft_cache_length"):
            soft_overlong([], completion_ids=[], soft_max_length=20, soft_cache_length=cache)
