"""The smallest recipe, and what becomes of it with other keys."""

import copy

import pytest

from moe_replay.errors import RecipeError
from moe_replay.recipe.load import recipe_from_table
from moe_replay.recipe.recipe import Recipe

SMALLEST = {
    "run": {"output_dir": "/runs/a", "max_steps": 10},
    "model": {"path": "/models/m"},
    "data": {"train": "/data/train.jsonl"},
    "rewards": [{"function": "exact_match"}],
    "rollout": {"max_completion_length": 64},
    "batch": {"global_batch_size": 32, "max_tokens_per_microbatch": 4096},
}


def table(**sections: object) -> dict:
    """Return the smallest recipe with keys of sections replaced or added, or with None removed."""
    result = copy.deepcopy(SMALLEST)
    for name, keys in sections.items():
        if isinstance(keys, dict):
            result.setdefault(name, {}).update(keys)
            result[name] = {key: value for key, value in result[name].items() if value is not None}
        else:
            result[name] = keys
    return result


def recipe(**sections: object) -> Recipe:
    return recipe_from_table(table(**sections))


def problems_of(**sections: object) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe(**sections)
    return str(caught.value)
