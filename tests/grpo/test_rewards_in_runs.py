"""Whole training runs whose reward functions misbehave."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_replay.errors import RewardError
from moe_replay.grpo.loop import train
from moe_replay.grpo.records import CompletionRecord, StepRecord
from moe_replay.recipe.recipe import ProcessSpec, Recipe
from moe_replay.report import BaseReporter, RunDirectory, build_reporter
from moe_replay.testing.ranks import run_ranks

pytestmark = pytest.mark.ranks
Recipes = Callable[..., Recipe]

DIGITS = "[sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]"


def run(recipe: Recipe, world_size: int = 1) -> list[str]:
    """Train in processes of their own; return what each rank raised on purpose."""

    def call() -> str:
        rank = torch.distributed.get_rank()
        directory = RunDirectory(recipe.run.output_dir)
        try:
            with build_reporter(recipe, rank=rank, run_directory=directory) as reporter:
                process = ProcessSpec(rank=rank, world_size=world_size)
                train(recipe, process=process, reporter=reporter)
        except RewardError as error:
            return str(error)
        return ""

    return run_ranks(call, world_size)


class Warnings(BaseReporter):
    """Keeps the warnings of every step."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def step(self, record: StepRecord, completions: Sequence[CompletionRecord]) -> None:
        """Take a finished step."""
        self.said += record.warnings


def metrics_of(recipe: Recipe) -> list[dict[str, Any]]:
    lines = (recipe.run.output_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def reward_file(folder: Path, code: str) -> str:
    (folder / "own_reward.py").write_text(code)
    return f"{folder}/own_reward.py:f"


def test_r1_exit_on_one_rank_is_named_on_all(recipe: Recipes, tmp_path: Path) -> None:
    # Prompt 7 is one rank's only; the other one's completions are scored without a fault.
    code = (
        "import sys\ndef f(completions, prompts):\n"
        "    return [sys.exit(0) if ' 7 ' in p else 1.0 for p in prompts]\n"
    )
    mine = recipe(rewards__0__function=reward_file(tmp_path, code), run__max_steps=12)
    said = run(mine, world_size=2)
    assert all("raised SystemExit: 0" in text for text in said)
    assert sum("on rank " in text for text in said) == 1


def test_r2_run_is_that_of_a_reward_that_changes_no_switch(recipe: Recipes, tmp_path: Path) -> None:
    clean = recipe(
        rewards__0__function=reward_file(tmp_path, f"def f(completions): return {DIGITS}\n"),
        run__output_dir=tmp_path / "clean",
        run__max_steps=1,
    )
    assert run(clean) == [""]
    switches = """
import os, random
import numpy as np
import torch
torch.set_grad_enabled(False)
def f(completions, prompts):
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    os.chdir("/")
    prompts.clear()
    """
    code = f"{switches}return {DIGITS}\n"
    switched = recipe(
        rewards__0__function=reward_file(tmp_path, code),
        run__output_dir=tmp_path / "switched",
        run__max_steps=1,
    )
    assert run(switched) == [""]
    (expected,) = metrics_of(clean)
    assert expected["grad_norm"] > 0
    assert metrics_of(switched) == [expected]


def test_d2_none_is_left_out_of_means_and_training_and_counted(
    recipe: Recipes, tmp_path: Path
) -> None:
    code = """
def f(completions, prompts):
    seen = {}
    scores = []
    for text, prompt in zip(completions, prompts):
        seen[prompt] = seen.get(prompt, 0) + 1
        scores.append(None if seen[prompt] == 1 else float(seen[prompt]))
    return scores
"""
    mine = recipe(rewards__0__function=reward_file(tmp_path, code), run__max_steps=1)
    assert run(mine) == [""]
    (record,) = metrics_of(mine)
    assert record["completions/unscored_ratio"] == record["rewards/f/none_ratio"] == 0.25
    assert record["reward"] == record["rewards/f/mean"] == 3.0
    lines = (mine.run.output_dir / "completions.jsonl").read_text().splitlines()
    rewards = [json.loads(line) for line in lines]
    assert [r["reward"] for r in rewards] == [None, 2.0, 3.0, 4.0] * 4
    assert [r["rewards"]["f"] for r in rewards[:2]] == [None, 2.0]
    np.testing.assert_allclose([r["advantage"] for r in rewards[:4]], [0, -1, 0, 1], atol=1e-3)


def test_d2_step_without_any_opinion_trains_nothing_and_the_run_goes_on(
    recipe: Recipes, tmp_path: Path
) -> None:
    code = "def f(completions): return [None] * len(completions)\n"
    mine = recipe(rewards__0__function=reward_file(tmp_path, code), run__max_steps=2)
    assert run(mine) == [""]
    for record in metrics_of(mine):
        assert record["completions/unscored_ratio"] == 1.0
        assert "reward" not in record


def test_d5_constant_reward_is_pointed_out_once(recipe: Recipes, tmp_path: Path) -> None:
    code = "def f(completions): return [0.5] * len(completions)\n"
    mine = recipe(rewards__0__function=reward_file(tmp_path, code), run__max_steps=3)

    def call() -> list[str]:
        reporter = Warnings()
        train(mine, process=ProcessSpec(), reporter=reporter)
        return [text for text in reporter.said if text.startswith("reward ")]

    ((said,),) = run_ranks(call, 1)
    assert said.startswith("reward f gave 0.5 to every completion of step 1")


def test_t17_a_run_compares_as_its_recipe_says(recipe: Recipes, tmp_path: Path) -> None:
    code = "def f(completions): return [float(n % 4 == 0) for n in range(len(completions))]\n"
    mine = recipe(
        rewards__0__function=reward_file(tmp_path, code),
        run__max_steps=1,
        grpo__advantage_estimator="rloo",
        grpo__scale_rewards="none",
    )
    assert run(mine) == [""]
    lines = (mine.run.output_dir / "completions.jsonl").read_text().splitlines()
    advantages = [json.loads(line)["advantage"] for line in lines[:4]]
    # With the mean of the others: 0 for the first, 1/3 for each of the rest.
    np.testing.assert_allclose(advantages, [1, -1 / 3, -1 / 3, -1 / 3], rtol=1e-12)
