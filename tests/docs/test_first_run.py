"""The recipe and the reward of the page about a first run are real ones."""

import re
from pathlib import Path

from moe_replay.recipe.load import load_recipe

PAGE = (Path(__file__).parents[2] / "docs" / "first-run.md").read_text()


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return found


def test_the_recipe_loads(tmp_path):
    (tmp_path / "recipe.toml").write_text(block("toml"))
    recipe = load_recipe(tmp_path / "recipe.toml")
    assert recipe.data.train == str(tmp_path / "train.jsonl")
    assert recipe.prompts_per_step == 8


def test_the_reward_scores_the_row():
    reward, _ = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict = {}
    exec(reward, names)
    assert names["accuracy"]([" 12", "13"], answer=["12", "12"]) == [1.0, 0.0]
