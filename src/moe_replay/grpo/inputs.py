"""What a recipe points to, opened and checked together: tokenizer, prompts, reward functions."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int32

from moe_replay.checkpoint.config import count_experts, read_config_json, refuse_nested
from moe_replay.checkpoint.tokenizer import load_tokenizer, no_checkpoint
from moe_replay.errors import RecipeError
from moe_replay.recipe.recipe import HeldOutSet, Recipe
from moe_replay.recipe.sections.locations import GENERATED, HUB
from moe_replay.tasks.chat_messages import check_arguments
from moe_replay.tasks.completion_text import exact_text
from moe_replay.tasks.datasets.arrow_rows import read_hub_table
from moe_replay.tasks.datasets.cache import DatasetCache, Progress
from moe_replay.tasks.datasets.file_prompts import FilePrompts, open_file_prompts
from moe_replay.tasks.datasets.files import dataset_files
from moe_replay.tasks.encoding import PromptEncoder
from moe_replay.tasks.environments.client import EnvironmentProcess
from moe_replay.tasks.environments.loading import check_columns
from moe_replay.tasks.environments.opening import OpenEnvironment, check_scored, open_environment
from moe_replay.tasks.generated import GeneratedTask
from moe_replay.tasks.mixture import MixedPrompts, Part
from moe_replay.tasks.prompts import (
    GeneratedPrompts,
    HeldOutPrompts,
    PromptSource,
    draw_held_out,
)
from moe_replay.tasks.rewards.builtin import BUILTIN_REWARDS
from moe_replay.tasks.rewards.rewards import RewardSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Everything outside the model that a run reads."""

    tokenizer: PreTrainedTokenizerBase
    """The transformers tokenizer of the checkpoint."""
    train: PromptSource
    """Prompts to train on."""
    held_out: Mapping[str, PromptSource]
    """Name of a set -> prompts to evaluate on; that of ``data.eval`` is empty."""
    rewards: RewardSet
    """Reward functions, whose columns both sources have."""
    environment: OpenEnvironment | None
    """What the model acts in over several turns; None where each completion is one turn."""
    notes: tuple[str, ...]
    """What is worth knowing about the datasets, one sentence each."""

    def close(self) -> None:
        """End the processes of the reward functions and of environments."""
        self.rewards.close()
        if self.environment is not None:
            self.environment.process.close()

    def text(self, token_ids: Int32[np.ndarray, " tokens"]) -> str:
        """Return what tokens say, special tokens included."""
        return exact_text(self.tokenizer, token_ids.tolist())


def open_inputs(recipe: Recipe, progress: Progress | None = None) -> Inputs:
    """Open everything that a recipe points to except the weights; the caller closes it.

    ``progress`` follows the work on large datasets.

    Raises:
        RecipeError: when something is missing, malformed, or does not fit the rest.
    """
    check_checkpoint_config(recipe)
    with ExitStack() as closing:
        folders = [str(Path.cwd())]
        rewards = closing.enter_context(RewardSet.load(recipe.rewards, folders=folders))
        process = None
        if recipe.environment is not None:
            process = closing.enter_context(EnvironmentProcess(recipe.environment, folders))
            check_scored(recipe, process)
        inputs = _open_prompts(recipe, rewards, process, progress)
        closing.pop_all()
    return inputs


def _open_prompts(
    recipe: Recipe,
    rewards: RewardSet,
    process: EnvironmentProcess | None,
    progress: Progress | None,
) -> Inputs:
    """Open tokenizer and datasets, and check that these have what the reward functions need."""
    tokenizer = load_tokenizer(recipe.model.path)
    check_tokenizer(tokenizer, recipe.model.path)
    data = recipe.data
    check_arguments(data.chat_template_kwargs, "data.chat_template_kwargs")
    encoder = PromptEncoder(
        tokenizer=tokenizer,
        data=data,
        tools=() if process is None else process.description.tools,
        keeps_given=process is not None,
    )
    encoder.check()
    environment = None if process is None else open_environment(recipe, process, encoder)
    cache = DatasetCache(data.cache_dir or _default_cache(), progress=progress)
    held_out = {asked.name: _open_held_out(asked, encoder, cache) for asked in recipe.held_out_sets}
    train = _open_train(recipe, encoder, held_out.values(), cache)
    for source in train.values():
        source.at(0, 1)
    sources = train | {asked.key: held_out[asked.name] for asked in recipe.held_out_sets}
    names = {each.key: each.name for each in (*recipe.training_sets, *recipe.held_out_sets)}
    notes = list(dict.fromkeys([*cache.notes, *encoder.notes(), *_notes(sources, set(train))]))
    if environment is not None:
        notes += environment.template.notes()
    for key, source in sources.items():
        rewards.check(source, names[key])
        if process is not None:
            check_columns(process.description, source.columns, key)
        notes += _gaps(key, source, rewards, names[key])
    return Inputs(
        tokenizer=tokenizer,
        train=_mixed(recipe, train),
        held_out=held_out,
        rewards=rewards,
        environment=environment,
        notes=tuple(notes),
    )


def _mixed(recipe: Recipe, train: Mapping[str, PromptSource]) -> PromptSource:
    """Return the datasets to train on, by key, as one."""
    if recipe.data.train is not None:
        return train["data.train"]
    parts = [
        Part(name=each.name, weight=each.weight, source=train[each.key])
        for each in recipe.training_sets
    ]
    return MixedPrompts(parts, seed=recipe.run.seed)


def _gaps(key: str, source: PromptSource, rewards: RewardSet, name: str) -> Iterator[str]:
    """Yield the columns that reward functions get as None, because some rows lack them.

    Raises:
        RecipeError: when a built-in function needs one: it cannot score a row without it.
    """
    if not isinstance(source, FilePrompts):
        return
    for spec, column in rewards.needs(name):
        gap = source.gap(column)
        if gap is not None and spec.function in BUILTIN_REWARDS:
            raise RecipeError(
                f"{key}: {gap}, which reward {spec.name} needs to score a completion: fill these "
                "rows, remove them, or write a reward function that returns None for them"
            )
        if gap is not None:
            yield f"{key}: {gap}; reward {spec.name} gets None for these"


def data_lines(recipe: Recipe, inputs: Inputs) -> list[str]:
    """Return what is trained and evaluated on, and what it is rewarded by, in words."""
    lines = []
    mixed = inputs.train.parts if isinstance(inputs.train, MixedPrompts) else None
    trained = [inputs.train] if mixed is None else [part.source for part in mixed]
    weights = sum(each.weight for each in recipe.training_sets)
    every = [
        (f"train {each.name}".rstrip(), each.dataset, source, each.weight / weights)
        for each, source in zip(recipe.training_sets, trained, strict=True)
    ] + [
        (f"eval {asked.name}".rstrip(), asked.dataset, inputs.held_out[asked.name], 1.0)
        for asked in recipe.held_out_sets
    ]
    for name, location, source, share in every:
        endless = source.num_prompts is None
        size = "generated without end" if endless else f"{source.num_prompts} prompts"
        drawn = f", {100 * share:.3g} % of the prompts" if share < 1 else ""
        lines.append(f"{name}: {location}, {size}{drawn}")
    rewards = [f"{reward.name} x {reward.weight:g}" for reward in recipe.rewards]
    if inputs.environment is not None:
        section, offers = inputs.environment.section, inputs.environment.process.description
        tools = [tool["function"]["name"] for tool in offers.tools]
        what = f"tools {', '.join(tools)}" if tools else section.form
        lines.append(
            f"environment: {section.name or 'functions'} ({what}), at most {section.max_turns} turns"
        )
        rewards += [f"{section.name} x {section.weight:g}"] * offers.has_reward
    return [*lines, f"rewards: {', '.join(rewards)}"]


def check_checkpoint_config(recipe: Recipe) -> None:
    """Raise `RecipeError` unless the checkpoint's config.json fits the replay mode and lengths.

    Reads that file only; building the model checks what the trainer supports of it.
    """
    if not recipe.model.path.is_dir():
        raise RecipeError(no_checkpoint(recipe.model.path))
    path = recipe.model.path / "config.json"
    config = read_config_json(recipe.model.path)
    refuse_nested(config, path)
    if recipe.replays and count_experts(config) == 0:
        raise RecipeError(
            f"{path} describes a dense model (model_type {config.get('model_type')!r}, no "
            "experts), but replay.router_replay_mode is "
            f"{recipe.replay.router_replay_mode.value!r}: a dense model has no routes to replay. "
            "Choose a mixture-of-experts checkpoint, or set replay.router_replay_mode = 'disabled'"
        )
    size = config.get("vocab_size")
    if beyond := [t for t in recipe.rollout.stop_token_ids if isinstance(size, int) and t >= size]:
        raise RecipeError(
            f"rollout.stop_token_ids holds {beyond}, expected ids below {size}, the vocab_size of "
            f"{path}: such tokens are never sampled"
        )
    context = config.get("max_position_embeddings")
    if isinstance(context, int) and context < recipe.max_sequence_length:
        raise RecipeError(
            f"the context of {recipe.model.path} is too short: max_position_embeddings is "
            f"{context} in its config.json, but data.max_prompt_length "
            f"{recipe.data.max_prompt_length} + rollout.max_completion_length "
            f"{recipe.rollout.max_completion_length} = {recipe.max_sequence_length} tokens. Lower "
            f"one of them by {recipe.max_sequence_length - context} or more"
        )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model_dir: Path) -> None:
    """Raise `RecipeError` if the tokenizer makes token ids that the model has no embedding for."""
    num_rows = read_config_json(model_dir).get("vocab_size")
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if isinstance(num_rows, int) and largest >= num_rows:
        raise RecipeError(
            f"the tokenizer in {model_dir} has token ids up to {largest}, but vocab_size is "
            f"{num_rows} in config.json, so the model has no embedding for some of them; copy the "
            "tokenizer files of the original checkpoint, or resize the embeddings"
        )


def recipe_dataset_files(recipe: Recipe, key: str) -> tuple[Path, ...]:
    """Return the files of a dataset to train on or of a held-out set; a generated one has none.

    Raises:
        RecipeError: when they cannot be found.
    """
    data = recipe.data
    every = (*recipe.training_sets, *recipe.held_out_sets)
    location, split = {each.key: (each.dataset, each.split) for each in every}[key]
    if location.startswith(GENERATED):
        return ()
    if location.startswith(HUB):
        return read_hub_table(location.removeprefix(HUB), config=data.hub_config, split=split)[1]
    return dataset_files(location, split=split)


def _notes(sources: Mapping[str, PromptSource], trained: Collection[str]) -> Iterator[str]:
    """Yield notes about datasets by key; those in ``trained`` are trained on."""
    of_key = {key: each.files for key, each in sources.items() if isinstance(each, FilePrompts)}
    for key, source in sources.items():
        if isinstance(source, FilePrompts):
            yield from (f"{key}: {note}" for note in source.notes())
        elif source.num_deleted:
            yield f"{key}: {source.num_deleted} prompts are longer than data.max_prompt_length and were left out"
        for other in trained:
            if key not in trained and set(of_key.get(key, ())) & set(of_key.get(other, ())):
                yield f"{key} reads files of {other}: the evaluation will show prompts that were trained on"


def _default_cache() -> Path | None:
    try:
        return Path.home() / ".cache" / "moe-replay"
    except RuntimeError:
        return None


def _open_held_out(asked: HeldOutSet, encoder: PromptEncoder, cache: DatasetCache) -> PromptSource:
    encoder = replace(encoder, dataset=asked.name)
    if asked.dataset.startswith(GENERATED):
        task = GeneratedTask(asked.dataset.removeprefix(GENERATED), asked.task)
        return draw_held_out(task, encoder, seed=asked.seed, num_prompts=asked.size)
    return open_file_prompts(
        asked.dataset,
        encoder,
        split=asked.split,
        shuffle_seed=None,
        max_prompts=asked.size,
        held_out=True,
        cache=cache,
    )


def _open_train(
    recipe: Recipe,
    encoder: PromptEncoder,
    held_out: Iterable[PromptSource],
    cache: DatasetCache,
) -> dict[str, PromptSource]:
    """Return key -> prompts of each dataset to train on."""
    drawn = (source for source in held_out if isinstance(source, HeldOutPrompts))
    excluded = frozenset().union(*(source.questions for source in drawn))
    opened: dict[str, PromptSource] = {}
    for each in recipe.training_sets:
        own = replace(encoder, dataset=each.name)
        if each.dataset.startswith(GENERATED):
            opened[each.key] = GeneratedPrompts(
                task=GeneratedTask(each.dataset.removeprefix(GENERATED), each.task),
                seed=each.seed,
                encoder=own,
                excluded_questions=excluded,
            )
        else:
            opened[each.key] = open_file_prompts(
                each.dataset,
                own,
                split=each.split,
                shuffle_seed=recipe.run.seed if recipe.data.shuffle else None,
                cache=cache,
                curriculum=recipe.curriculum,
            )
    return opened
