"""What a metric of evaluations was measured on: values on other prompts are no better or worse."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256

from moe_replay.recipe.recipe import Recipe
from moe_replay.tasks.prompts import PromptSource
from moe_replay.tasks.rewards.wire import encode_value


def measured_on(recipe: Recipe, held_out: Mapping[str, PromptSource], metric: str) -> str:
    """Return a digest of what decides a metric of evaluations beside the weights and the rewards.

    That is the set of held-out prompts, with what rewards see of them, and ``[eval]``: under the
    same name an edited file, or another temperature, measures something else.
    """
    part = metric.removeprefix("eval/").partition("/")[0]
    name = part if part in held_out else ""
    digest = sha256()
    asked = next(each for each in recipe.held_out_sets if each.name == name)
    source = held_out[name]
    for prompt in source.at(0, min(asked.size, source.num_prompts or asked.size)):
        columns = {key: _plain(value) for key, value in prompt.columns.items()}
        text = json.dumps([prompt.text, columns], sort_keys=True)
        digest.update(text.encode("utf-8", "surrogatepass"))
    settings = recipe.eval.model_dump(mode="json", exclude={"every_steps"})
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()[:32]


def _plain(value: object) -> object:
    try:
        return encode_value(value)
    except (TypeError, RecursionError):
        # A kind of column that no reward function can get.
        return type(value).__name__
