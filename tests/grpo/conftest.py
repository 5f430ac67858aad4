"""A tiny checkpoint, a small dataset and a reward function for whole training runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Imported once here, where every forked rank would import it again.
import moe_replay.engines.embedded.engine  # noqa: F401
from moe_replay.checkpoint.tokenizer import load_tokenizer
from moe_replay.recipe.load import load_recipe
from moe_replay.recipe.recipe import Recipe
from moe_replay.testing.tiny_models import write_tiny_checkpoint

REWARD = """
def likes_digits(completions, **columns):
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]

def likes_low_ids(completions, completion_ids, **columns):
    return [-float(ids[0]) for ids in completion_ids]
"""

RECIPE = """
[run]
output_dir = "out"
max_steps = 3
[model]
path = "model"
[data]
train = "train.jsonl"
max_prompt_length = 32
[[rewards]]
function = "reward.py:likes_digits"
[rollout]
max_completion_length = 10
num_generations = 4
[batch]
global_batch_size = 16
max_tokens_per_microbatch = 160
[optimizer]
lr = 1e-3
# Counted, so that no test depends on how long a checkpoint takes here.
[checkpoint]
save_steps = 1
"""


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with ``model/``, ``train.jsonl``, ``reward.py`` and ``recipe.toml``."""
    folder = tmp_path_factory.mktemp("workspace")
    write_tiny_checkpoint(folder / "model", num_hidden_layers=3)
    load_tokenizer(folder / "model")
    prompts = [{"prompt": f"say {number} and {number * 7 % 10}:"} for number in range(40)]
    (folder / "train.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    (folder / "reward.py").write_text(REWARD)
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


@pytest.fixture
def recipe(workspace: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """Return a function that loads the recipe with overrides; ``_`` stands for the dot of a key."""

    def load(**overrides: Any) -> Recipe:
        values = {"run__output_dir": str(tmp_path / "out"), **overrides}
        pairs = [(key.replace("__", "."), str(value)) for key, value in values.items()]
        return load_recipe(workspace / "recipe.toml", pairs)

    return load
