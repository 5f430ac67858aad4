"""The calculator example: its model, and that calling the tool pays under R3."""

import json
from pathlib import Path

import pytest

from moe_replay.recipe.load import load_recipe

from ..grpo.test_loop import run

RECIPE = Path(__file__).parents[2] / "examples/calculator/recipe.toml"


@pytest.mark.ranks
@pytest.mark.slow
def test_the_model_learns_to_call_its_calculator(tmp_path):
    # The schedule's rate is constant, so that a run may be shorter.
    changes = {"run.output_dir": str(tmp_path / "out"), "run.max_steps": 8}
    records = run(load_recipe(RECIPE, {**changes, "checkpoint.export": False}))
    first, last = records[0], records[-1]
    assert first["rewards/exact_match/mean"] < 0.4
    assert last["rewards/exact_match/mean"] > 0.8
    assert first["tools/call_frequency"] < 0.4
    assert last["tools/call_frequency"] > 0.8
    for record in records:
        assert record["replay/coverage"] == 1.0
        assert record["replay/agreement"] > 0.95
    lines = (tmp_path / "out/completions.jsonl").read_text().splitlines()
    right = [line for line in map(json.loads, lines) if line["reward"] == 1 and line["turns"]]
    called = next(line for line in right if len(line["turns"]) == 3)
    product = called["columns"]["answer"]
    asked, told, answered = (turn["text"] for turn in called["turns"])
    assert asked.startswith('<tool_call>{"name": "multiply"')
    assert told == f"<tool>{product}<assistant>"
    assert answered == f"<answer>{product}</answer>"
