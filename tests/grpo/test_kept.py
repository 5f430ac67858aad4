"""Which completions a run keeps, beside which columns, in steps and in evaluations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_replay.recipe.recipe import Recipe

from .test_loop import run

Recipes = Callable[..., Recipe]
REWARD = """
def near(completions, *, answer, level=None):
    return [float(str(right) in text) for text, right in zip(completions, answer)]
"""


@pytest.fixture
def asked(recipe: Recipes, tmp_path: Path) -> Recipes:
    """Return a loader of a recipe whose reward reads all columns of its dataset but one."""
    rows = [
        {"prompt": f"{n} + 1 =", "answer": n + 1, "level": {"digits": [n]}, "unread": "x" * 99}
        for n in range(40)
    ]
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "near.py").write_text(REWARD)

    def load(**overrides: Any) -> Recipe:
        return recipe(
            data__train=tmp_path / "train.jsonl",
            data__eval=tmp_path / "eval.jsonl",
            data__eval_size=5,
            data__shuffle="false",
            rewards__0__function=f"{tmp_path / 'near.py'}:near",
            run__max_steps=1,
            **overrides,
        )

    return load


def lines(recipe: Recipe, name: str) -> list[dict[str, Any]]:
    text = (recipe.run.output_dir / f"{name}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.ranks
def test_d21_completions_stand_beside_what_their_rewards_read(asked: Recipes) -> None:
    loaded = asked()
    run(loaded, world_size=2)
    kept = lines(loaded, "completions")
    # Four prompts of four completions, in the order of the dataset whatever rank sampled them.
    assert [line["item"] for line in kept] == [n for n in range(4) for _ in range(4)]
    for line in kept:
        item = line["item"]
        assert line["prompt"] == f"{item} + 1 ="
        assert line["columns"] == {"answer": item + 1, "level": {"digits": [item]}}
        assert line["rewards"]["near"] == float(str(item + 1) in line["completion"])
    evaluated = lines(loaded, "eval_completions")
    assert [(line["step"], line["item"]) for line in evaluated] == [
        (step, item) for step in (0, 1) for item in range(5)
    ]
    assert {line["advantage"] for line in evaluated} == {None}
    for step in (0, 1):
        mean = sum(line["reward"] for line in evaluated if line["step"] == step) / 5
        (record,) = [each for each in lines(loaded, "eval") if each["step"] == step]
        assert record["eval/reward"] == pytest.approx(mean)


@pytest.mark.ranks
def test_d21_the_number_that_is_kept_is_bounded(asked: Recipes) -> None:
    loaded = asked(logging__completions=3, logging__num_with_tokens=0)
    run(loaded, world_size=2)
    assert [line["item"] for line in lines(loaded, "completions")] == [0, 0, 0]
    assert [line["item"] for line in lines(loaded, "eval_completions")] == [0, 1, 2] * 2


@pytest.mark.ranks
def test_d21_none_are_kept_where_none_are_wanted(asked: Recipes) -> None:
    loaded = asked(logging__completions=0)
    run(loaded)
    assert lines(loaded, "completions") == lines(loaded, "eval_completions") == []
