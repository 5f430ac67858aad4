"""Prompts by position: the same sequence of token ids in every process and after every resume.

What a source of prompts is, and generated prompts; `datasets.file_prompts` reads them from files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from moe_replay.errors import RecipeError
from moe_replay.tasks.encoding import Prompt, PromptEncoder, PromptInput
from moe_replay.tasks.generated import GeneratedTask

_GENERATED_COLUMNS = frozenset({"question", "answer", "metadata", "task"})
_MAX_REPLACEMENTS = 1000


@runtime_checkable
class PromptSource(Protocol):
    """A sequence of prompts, addressed by position."""

    @property
    def num_prompts(self) -> int | None:
        """Distinct prompts; None when they never end."""
        ...

    @property
    def num_deleted(self) -> int:
        """Prompts omitted so far because they exceed ``max_prompt_length``."""
        ...

    @property
    def columns(self) -> frozenset[str]:
        """Names of the columns that every prompt carries."""
        ...

    def at(self, position: int, count: int, *, step: int = 1) -> list[Prompt]:
        """Return the prompts from ``position`` on; every call gives the same ones.

        ``step`` (from 1) is the one that trains on them, where a curriculum goes by steps.
        """
        ...


@dataclass(kw_only=True)
class GeneratedPrompts:
    """Endless items of a reasoning-gym family; the position is the index of the item."""

    task: GeneratedTask
    """The family."""
    seed: int
    """Which of its infinitely many sequences of items."""
    encoder: PromptEncoder
    """How questions become tokens."""
    excluded_questions: frozenset[str] = frozenset()
    """Held-out questions; an item that repeats one is replaced by the same other item in every
    process."""
    _deleted: set[tuple[int, int]] = field(default_factory=set)

    @property
    def num_prompts(self) -> int | None:
        """None: items never end."""
        return None

    @property
    def num_deleted(self) -> int:
        """Items replaced so far because they are too long."""
        return len(self._deleted)

    @property
    def columns(self) -> frozenset[str]:
        """``question``, ``answer``, ``metadata``, and the ``task`` that scores answers."""
        return _GENERATED_COLUMNS

    def at(self, position: int, count: int, *, step: int = 1) -> list[Prompt]:
        """Return the items from ``position`` on."""
        return [self._prompt(number) for number in range(position, position + count)]

    def _prompt(self, number: int) -> Prompt:
        for replacement in range(_MAX_REPLACEMENTS):
            item = self.task.item(self.seed, number, replacement=replacement)
            if item["question"] in self.excluded_questions:
                continue
            prompt = self.encoder.encode(_prompt_input(self.task, item, number))
            if prompt is not None:
                return prompt
            self._deleted.add((number, replacement))
        raise RecipeError(
            f"{self.task.name}: {_MAX_REPLACEMENTS} draws for item {number} gave only held-out questions or prompts "
            f"above data.max_prompt_length = {self.encoder.data.max_prompt_length}: the family has too few distinct items. "
            "Lower data.eval_size, widen data.task, or raise data.max_prompt_length"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutPrompts:
    """A fixed number of distinct generated items. Make one with `draw_held_out`."""

    prompts: tuple[Prompt, ...]
    """The items, no question twice."""
    num_deleted: int
    """Items omitted because they are too long."""

    @property
    def num_prompts(self) -> int | None:
        """Number of items."""
        return len(self.prompts)

    @property
    def columns(self) -> frozenset[str]:
        """As `GeneratedPrompts.columns`."""
        return _GENERATED_COLUMNS

    @property
    def questions(self) -> frozenset[str]:
        """Questions that training must not see."""
        return frozenset(prompt.columns["question"] for prompt in self.prompts)

    def at(self, position: int, count: int, *, step: int = 1) -> list[Prompt]:
        """Return the items from ``position`` on; there are ``num_prompts``."""
        assert position + count <= len(self.prompts)
        return list(self.prompts[position : position + count])


def draw_held_out(
    task: GeneratedTask, encoder: PromptEncoder, *, seed: int, num_prompts: int
) -> HeldOutPrompts:
    """Draw ``num_prompts`` items with distinct questions.

    Raises:
        RecipeError: the family has too few distinct items.
    """
    prompts: dict[str, Prompt] = {}
    deleted: set[str] = set()
    number = last_new = 0
    while len(prompts) < num_prompts:
        if number - last_new > _MAX_REPLACEMENTS:
            raise RecipeError(
                f"{task.name}: {len(prompts)} distinct prompts found in {number} draws, the held-out set asks for "
                f"{num_prompts} ({len(deleted)} were too long): lower its size (data.eval_size), or widen its task"
            )
        item = task.item(seed, number)
        question = item["question"]
        if question not in prompts and question not in deleted:
            prompt = encoder.encode(_prompt_input(task, item, number))
            if prompt is None:
                deleted.add(question)
            else:
                prompts[question] = prompt
                last_new = number
        number += 1
    return HeldOutPrompts(prompts=tuple(prompts.values()), num_deleted=len(deleted))


def _prompt_input(task: GeneratedTask, item: Mapping[str, Any], number: int) -> PromptInput:
    return PromptInput(
        where=f"{task.name} item {number}",
        index=number,
        prompt=item["question"],
        columns={name: item[name] for name in ("question", "answer", "metadata")} | {"task": task},
    )
