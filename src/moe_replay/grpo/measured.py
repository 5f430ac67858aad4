"""What a metric of evaluations was measured on: values on other prompts are no better or worse."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import sha256
from typing import Any

from moe_replay.grpo.engines import eval_sampling
from moe_replay.recipe.recipe import Recipe
from moe_replay.recipe.sections.environment import EnvironmentSection
from moe_replay.tasks.prompts import PromptSource
from moe_replay.tasks.rewards.wire import encode_value


def measured_on(recipe: Recipe, held_out: Mapping[str, PromptSource], metric: str) -> str:
    """Return a digest of what decides a metric of evaluations beside the weights and the rewards.

    That is the set of held-out prompts, with what rewards see of them, how they are sampled, and
    the environment: under the same name an edited file, or another temperature, measures something
    else. What passes decides ``pass@k`` alone.
    """
    first, _, rest = metric.removeprefix("eval/").partition("/")
    # ``eval/reward`` is of the set without a name, also where another set is called ``reward``.
    name = first if rest and first in held_out else ""
    digest = sha256()
    asked = next(each for each in recipe.held_out_sets if each.name == name)
    source = held_out[name]
    for prompt in source.at(0, min(asked.size, source.num_prompts or asked.size)):
        columns = {key: _plain(value) for key, value in prompt.columns.items()}
        text = json.dumps([prompt.text, columns], sort_keys=True)
        digest.update(text.encode("utf-8", "surrogatepass"))
    settings = json.dumps(_settings(recipe, metric), sort_keys=True)
    digest.update(settings.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


def _settings(recipe: Recipe, metric: str) -> dict[str, Any]:
    """Return how completions are sampled and judged for a metric, by what counts in the end."""
    drawn = asdict(eval_sampling(recipe))
    # Another seed draws other completions from the same distribution.
    sampling = {name: value for name, value in drawn.items() if name != "seed"}
    found: dict[str, Any] = {
        "sampling": sampling,
        "stop": recipe.rollout.stop,
        "num_generations": recipe.eval.num_generations,
    }
    if metric.rpartition("/")[2].startswith("pass@"):
        found["passes"] = recipe.eval.model_dump(include={"pass_reward", "pass_threshold"})
    if recipe.environment is not None:
        found["environment"] = _environment(recipe.environment)
    return found


def _environment(section: EnvironmentSection) -> dict[str, Any]:
    """Return the keys that decide what happens in an environment; a folder may be moved."""
    keys = section.model_dump(mode="json", exclude={"timeout_s", "max_concurrent_calls"})
    tools = [tool.rpartition(":")[2] for tool in section.tools]
    return keys | {"factory": section.name, "tools": tools}


def _plain(value: object) -> object:
    try:
        return encode_value(value)
    except (TypeError, RecursionError):
        # A kind of column that no reward function can get.
        return type(value).__name__
