"""The recipe of the page about a first run is a real one."""

import re
from pathlib import Path

from moe_replay.recipe.load import load_recipe

PAGE = (Path(__file__).parents[2] / "docs" / "first-run.md").read_text()


def test_the_recipe_loads(tmp_path):
    (block,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "recipe.toml").write_text(block)
    recipe = load_recipe(tmp_path / "recipe.toml")
    assert recipe.data.train == str(tmp_path / "train.jsonl")
    assert recipe.prompts_per_step == 8
