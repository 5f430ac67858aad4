"""What a recipe points to, opened and checked together: tokenizer, prompts, held-out prompts, reward functions.

In: a recipe. Out: `Inputs`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_replay.checkpoint.config import count_experts, read_config_json, refuse_nested
from moe_replay.checkpoint.tokenizer import load_tokenizer, no_checkpoint
from moe_replay.errors import RecipeError
from moe_replay.grpo.prompt_sources import open_prompt_sources
from moe_replay.recipe.recipe import Recipe
from moe_replay.tasks.datasets.cache import Progress
from moe_replay.tasks.datasets.prompts import FilePrompts
from moe_replay.tasks.prompts import PromptSource
from moe_replay.tasks.rewards.builtin import BUILTIN_REWARDS
from moe_replay.tasks.rewards.rewards import RewardSet, RewardSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Everything outside the model that a run reads."""

    tokenizer: Any
    """The transformers tokenizer of the checkpoint."""
    train: PromptSource
    """Prompts to train on."""
    held_out: PromptSource | None
    """Prompts to evaluate on; None without ``data.eval``."""
    rewards: RewardSet
    """Reward functions, whose columns both sources have."""
    notes: tuple[str, ...]
    """What a person should know about the datasets, one sentence each."""

    def close(self) -> None:
        """End the process of the reward functions."""
        self.rewards.close()


def open_inputs(recipe: Recipe, progress: Progress | None = None) -> Inputs:
    """Open everything that a recipe points to, the weights aside; close it in the end.

    ``progress`` is told how far the work on large datasets has come.

    Raises:
        RecipeError: when something is missing, malformed, or does not fit the rest.
    """
    check_checkpoint_config(recipe)
    with ExitStack() as closing:
        rewards = closing.enter_context(
            RewardSet.load(
                [RewardSpec(**r.model_dump()) for r in recipe.rewards], folders=[str(Path.cwd())]
            )
        )
        inputs = _open_prompts(recipe, rewards, progress)
        closing.pop_all()
    return inputs


def _open_prompts(recipe: Recipe, rewards: RewardSet, progress: Progress | None) -> Inputs:
    """Open tokenizer and datasets, and check that these have what the reward functions need."""
    tokenizer = load_tokenizer(recipe.model.path)
    check_tokenizer(tokenizer, recipe.model.path)
    prompts = open_prompt_sources(recipe, tokenizer, progress)
    notes = list(prompts.notes)
    for key, source in (("data.train", prompts.train), ("data.eval", prompts.held_out)):
        if source is not None:
            rewards.check(source)
            notes += _gaps(key, source, rewards)
    return Inputs(
        tokenizer=tokenizer,
        train=prompts.train,
        held_out=prompts.held_out,
        rewards=rewards,
        notes=tuple(notes),
    )


def _gaps(key: str, source: PromptSource, rewards: RewardSet) -> Iterator[str]:
    """Yield what reward functions will get as None, because some rows lack it.

    Raises:
        RecipeError: when a built-in function needs it, for which a row without it cannot be scored.
    """
    if not isinstance(source, FilePrompts):
        return
    for spec, column in rewards.needs():
        gap = source.gap(column)
        if gap is not None and spec.function in BUILTIN_REWARDS:
            raise RecipeError(
                f"{key}: {gap}, which reward {spec.name} needs to score a completion: fill these rows, remove them, or "
                "write a reward function that returns None for them"
            )
        if gap is not None:
            yield f"{key}: {gap}; reward {spec.name} is given None for these"


def data_lines(recipe: Recipe, inputs: Inputs) -> list[str]:
    """Return what is trained and evaluated on, and what it is rewarded by, in words."""
    named = [("train", recipe.data.train, inputs.train)]
    if inputs.held_out is not None:
        named.append(("eval", str(recipe.data.eval), inputs.held_out))
    lines = [
        f"{name}: {location}, "
        + (
            "generated without end"
            if source.num_prompts is None
            else f"{source.num_prompts} prompts"
        )
        for name, location, source in named
    ]
    rewards = [f"{reward.name} x {reward.weight:g}" for reward in recipe.rewards]
    return [*lines, f"rewards: {', '.join(rewards)}"]


def check_checkpoint_config(recipe: Recipe) -> None:
    """Raise `RecipeError` unless the checkpoint's config.json fits the recipe's replay mode and lengths.

    Reads only that file; what the trainer supports of it is checked when the model is built.
    """
    if not recipe.model.path.is_dir():
        raise RecipeError(no_checkpoint(recipe.model.path))
    path = recipe.model.path / "config.json"
    config = read_config_json(recipe.model.path)
    refuse_nested(config, path)
    if recipe.replays and count_experts(config) == 0:
        raise RecipeError(
            f"{path} describes a dense model (model_type {config.get('model_type')!r}, no experts), but "
            f"replay.router_replay_mode is {recipe.replay.router_replay_mode.value!r}: a dense model has no routes to "
            "replay. Choose a mixture-of-experts checkpoint, or set replay.router_replay_mode = 'disabled'"
        )
    size = config.get("vocab_size")
    if beyond := [t for t in recipe.rollout.stop_token_ids if isinstance(size, int) and t >= size]:
        raise RecipeError(
            f"rollout.stop_token_ids holds {beyond}, expected ids below {size}, the vocab_size of {path}: such tokens are "
            "never sampled"
        )
    context = config.get("max_position_embeddings")
    if isinstance(context, int) and context < recipe.max_sequence_length:
        raise RecipeError(
            f"the context of {recipe.model.path} is too short: max_position_embeddings is {context} in its "
            f"config.json, but data.max_prompt_length {recipe.data.max_prompt_length} + "
            f"rollout.max_completion_length {recipe.rollout.max_completion_length} = {recipe.max_sequence_length} "
            f"tokens. Lower one of them by {recipe.max_sequence_length - context} or more"
        )


def check_tokenizer(tokenizer: Any, model_dir: Path) -> None:
    """Raise `RecipeError` if the tokenizer can make token ids that the model has no embedding for."""
    num_rows = read_config_json(model_dir).get("vocab_size")
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if isinstance(num_rows, int) and largest >= num_rows:
        raise RecipeError(
            f"the tokenizer in {model_dir} has token ids up to {largest}, but vocab_size is {num_rows} in config.json, so "
            "the model has no embedding for some of them; copy the tokenizer files of the original checkpoint, or resize "
            "the embeddings"
        )
