"""From ``[data]`` of a recipe to its prompts: training and held-out ones, and what a person should know about both.

In: a recipe, a tokenizer. Out: `PromptSources`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_replay.recipe.recipe import Recipe
from moe_replay.recipe.rules import GENERATED
from moe_replay.tasks.chat_messages import check_arguments
from moe_replay.tasks.datasets.arrow_rows import read_hub_table
from moe_replay.tasks.datasets.cache import DatasetCache, Progress
from moe_replay.tasks.datasets.files import HUB, dataset_files
from moe_replay.tasks.datasets.prompts import FilePrompts, open_file_prompts
from moe_replay.tasks.encoding import PromptEncoder
from moe_replay.tasks.generated import GeneratedTask
from moe_replay.tasks.prompts import (
    GeneratedPrompts,
    HeldOutPrompts,
    PromptSource,
    draw_held_out,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSources:
    """The prompts of a run."""

    train: PromptSource
    """Prompts to train on."""
    held_out: PromptSource | None
    """Prompts to evaluate on; None without ``data.eval``."""
    notes: tuple[str, ...]
    """What a person should know about them, one sentence each."""


def open_prompt_sources(
    recipe: Recipe, tokenizer: Any, progress: Progress | None = None
) -> PromptSources:
    """Open the datasets of a recipe, and check every prompt of those that are files.

    Raises:
        RecipeError: when something is missing, malformed, or does not fit the rest.
    """
    data = recipe.data
    check_arguments(data.chat_template_kwargs, "data.chat_template_kwargs")
    encoder = PromptEncoder(
        tokenizer=tokenizer,
        max_prompt_length=data.max_prompt_length,
        truncation=data.truncation,
        system_prompt=data.system_prompt,
        chat_template_kwargs=data.chat_template_kwargs,
        final_assistant_message=data.final_assistant_message,
    )
    encoder.check()
    cache = DatasetCache(data.cache_dir or _default_cache(), progress=progress)
    held_out = _open_held_out(recipe, encoder, cache)
    train = _open_train(recipe, encoder, held_out, cache)
    train.at(0, 1)
    notes = [*cache.notes, *encoder.notes(), *_notes(train, held_out)]
    return PromptSources(train=train, held_out=held_out, notes=tuple(dict.fromkeys(notes)))


def recipe_dataset_files(recipe: Recipe, key: str) -> tuple[Path, ...]:
    """Return the files of ``data.train`` or ``data.eval``; a generated dataset has none.

    Raises:
        RecipeError: when they cannot be found.
    """
    data = recipe.data
    location, split = {
        "data.train": (data.train, data.train_split),
        "data.eval": (data.eval, data.eval_split),
    }[key]
    if location is None or location.startswith(GENERATED):
        return ()
    if location.startswith(HUB):
        return read_hub_table(location.removeprefix(HUB), config=data.hub_config, split=split)[1]
    return dataset_files(location, split=split).paths


def _notes(train: PromptSource, held_out: PromptSource | None) -> Iterator[str]:
    for key, source in (("data.train", train), ("data.eval", held_out)):
        if isinstance(source, FilePrompts):
            yield from (f"{key}: {note}" for note in source.notes())
        elif source is not None and source.num_deleted:
            yield f"{key}: {source.num_deleted} prompts are longer than data.max_prompt_length and were left out"
    if (
        isinstance(train, FilePrompts)
        and isinstance(held_out, FilePrompts)
        and set(train.files) & set(held_out.files)
    ):
        yield "data.eval reads files of data.train: the evaluation will show prompts that were trained on"


def _default_cache() -> Path | None:
    try:
        return Path.home() / ".cache" / "moe-replay"
    except RuntimeError:
        return None


def _open_held_out(
    recipe: Recipe, encoder: PromptEncoder, cache: DatasetCache
) -> PromptSource | None:
    location = recipe.data.eval
    if location is None:
        return None
    if location.startswith(GENERATED):
        task = GeneratedTask(location.removeprefix(GENERATED), recipe.data.task)
        return draw_held_out(
            task, encoder, seed=recipe.data.eval_seed, num_prompts=recipe.data.eval_size
        )
    return _open_files(recipe, location, encoder, cache, held_out=True)


def _open_train(
    recipe: Recipe, encoder: PromptEncoder, held_out: PromptSource | None, cache: DatasetCache
) -> PromptSource:
    location = recipe.data.train
    if location.startswith(GENERATED):
        return GeneratedPrompts(
            task=GeneratedTask(location.removeprefix(GENERATED), recipe.data.task),
            seed=recipe.data.train_seed,
            encoder=encoder,
            excluded_questions=held_out.questions
            if isinstance(held_out, HeldOutPrompts)
            else frozenset(),
        )
    return _open_files(recipe, location, encoder, cache, held_out=False)


def _open_files(
    recipe: Recipe, location: str, encoder: PromptEncoder, cache: DatasetCache, *, held_out: bool
) -> FilePrompts:
    data = recipe.data
    shuffles = data.shuffle and not held_out
    return open_file_prompts(
        location,
        encoder,
        prompt_column=data.prompt_column,
        messages_column=data.messages_column,
        renamed=data.columns,
        dropped=frozenset(data.drop_columns),
        split=data.eval_split if held_out else data.train_split,
        hub_config=data.hub_config,
        shuffle_seed=recipe.run.seed if shuffles else None,
        max_prompts=data.eval_size if held_out else None,
        held_out=held_out,
        cache=cache,
    )
