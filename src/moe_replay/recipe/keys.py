"""Every key of a recipe by name: what the help lists, and which key a wrong name probably meant.

In: the sections of a recipe. Out: `RecipeKey`, `recipe_keys`, nearest keys.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, get_args, get_origin

from pydantic_core import PydanticUndefined

from moe_replay.recipe.recipe import Recipe
from moe_replay.recipe.sections import RewardSection, Section, is_list


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeKey:
    """One key that a recipe may set, for help and documentation."""

    path: str
    """Dotted key; ``rewards.N.`` stands for any entry of the list."""
    default: str
    """TOML spelling of the default, ``required`` or ``none``."""
    choices: tuple[str, ...]
    """Values that it takes; empty where there are too many to list."""
    is_list: bool
    """Whether it takes several of them; one is written without brackets."""
    text: str
    """What it does."""


def _section_types() -> dict[str, type[Section]]:
    sections: dict[str, type[Section]] = {"rewards": RewardSection}
    for name, field in Recipe.model_fields.items():
        if get_origin(field.annotation) is not tuple:
            assert isinstance(field.annotation, type) and issubclass(field.annotation, Section)
            sections[name] = field.annotation
    return {name: sections[name] for name in Recipe.model_fields}


SECTIONS = _section_types()
"""Name of a table -> its model; ``rewards`` is a list of them."""

_DERIVED_DEFAULTS = {
    ("rewards", "name"): "the function's name",
    ("grpo", "epsilon_high"): "epsilon",
}

# What other trainers call it -> our key.
_OTHER_NAMES = {
    "learning_rate": "optimizer.lr",
    "max_grad_norm": "optimizer.clip_grad",
    "batch_size": "batch.global_batch_size",
    "train_batch_size": "batch.global_batch_size",
    "per_device_train_batch_size": "batch.micro_batch_size",
    "num_iterations": "batch.steps_per_generation",
    "n": "rollout.num_generations",
    "group_size": "rollout.num_generations",
    "max_new_tokens": "rollout.max_completion_length",
    "max_tokens": "rollout.max_completion_length",
    "max_response_length": "rollout.max_completion_length",
    "steps": "run.max_steps",
    "output": "run.output_dir",
    "model": "model.path",
    "dataset": "data.train",
    "reward": "rewards.0.function",
    "kl_coef": "grpo.beta",
    "clip_ratio": "grpo.epsilon",
    "mode": "replay.router_replay_mode",
    "report_to": "logging.sinks",
    "tp": "megatron.tensor_model_parallel_size",
    "pp": "megatron.pipeline_model_parallel_size",
    "ep": "megatron.expert_model_parallel_size",
    "cp": "megatron.context_parallel_size",
}


def recipe_keys() -> Iterator[RecipeKey]:
    """Yield every key that a recipe may set, in the order of the sections."""
    for name, section in SECTIONS.items():
        prefix = f"{name}.N" if name == "rewards" else name
        for key, field in section.model_fields.items():
            default = field.default
            if field.default_factory is not None:
                spelling = "{}"
            elif default is PydanticUndefined:
                spelling = _DERIVED_DEFAULTS.get((name, key), "required")
            elif default is None:
                spelling = "none"
            else:
                spelling = _spell(default)
            yield RecipeKey(
                path=f"{prefix}.{key}",
                default=spelling,
                choices=choices_of(field.annotation),
                is_list=is_list(field.annotation),
                text=(field.description or "").strip(),
            )


def choices_of(annotation: Any) -> tuple[str, ...]:
    """Return the texts that a type admits, inside lists and optional ones too; empty unless they are few.

    Example:
        >>> choices_of(tuple[Literal["a", "b"], ...])
        ('a', 'b')
    """
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return tuple(str(member.value) for member in annotation)
    arguments = get_args(annotation)
    own = [choice for choice in arguments if isinstance(choice, str)]
    inner = [choice for argument in arguments for choice in choices_of(argument)]
    return tuple(own + inner)


def nearest(path: str) -> str:
    """Say which known key a wrong one probably meant: the same name elsewhere, or the most similar one."""
    section, _, leaf = path.rpartition(".")
    if not section:
        close = difflib.get_close_matches(leaf, SECTIONS, n=1)
        hint = (
            f"did you mean [{close[0]}]?" if close else f"the sections are {', '.join(SECTIONS)}."
        )
        return f"{hint} Rename it, or remove it"
    known = [key.path for key in recipe_keys()]
    own = [_leaf(key) for key in known if key.partition(".")[0] == path.partition(".")[0]]
    close = difflib.get_close_matches(leaf, own, n=1, cutoff=0.7)
    if close:
        return f"did you mean {section}.{close[0]}? Rename it, or remove it"
    elsewhere = nearest_keys(leaf)
    if elsewhere:
        return f"did you mean {elsewhere[0]}? Move it there, or remove it"
    return f"[{section}] knows {', '.join(own)}. Remove it"


def nearest_keys(name: str) -> Sequence[str]:
    """Return the dotted keys that a name without a section may mean, the likeliest first; empty when none is near.

    Example:
        >>> nearest_keys("lr")
        ['optimizer.lr']
    """
    leaf = name.replace("-", "_").lower()
    known = [key.path.replace(".N.", ".0.") for key in recipe_keys()]
    equal = [key for key in known if _leaf(key) == leaf]
    if equal:
        return equal
    if leaf in _OTHER_NAMES:
        return [_OTHER_NAMES[leaf]]
    leaves = {_leaf(key): key for key in reversed(known)}
    return [leaves[close] for close in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75)]


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _spell(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return str(list(value))
    return f'"{value}"' if isinstance(value, str | Enum) else str(value)
