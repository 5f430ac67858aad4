"""Sections of what training prompts are drawn from beside ``[data]``: mixtures, curricula."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from moe_replay.recipe.sections.base import Key, Section, Several
from moe_replay.recipe.sections.locations import anchored_dataset


class MixtureSection(Section):
    """``[[mixture]]``: one of several datasets to train on, in place of ``data.train``."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """Name in metrics, which are ``datasets/<name>/reward`` and so on, and in
    ``rewards.datasets``."""
    dataset: Annotated[str, Key(anchor=anchored_dataset, also_called=("path",))]
    """Its prompts, in the forms of ``data.train``; columns are named as ``[data]`` says."""
    weight: Annotated[float, Key(also_called=("probability", "interleave_prob"))] = Field(
        default=1.0, gt=0
    )
    """How often prompts are drawn from it, in proportion to the weights of the others."""
    split: str = "train"
    """Split of ``dataset`` where that is a folder or a dataset of the hub."""
    seed: int = Field(default=1, ge=0)
    """Seed of generated items."""
    task: dict[str, Any] = Field(default_factory=dict)
    """Configuration of the reasoning-gym family of generated items."""


class CurriculumSection(Section):
    """``[curriculum]``: training prompts of files by a numeric column, easy ones first."""

    column: Annotated[str, Key(also_called=("difficulty_column",))]
    """Column, or dotted path, with a number for each prompt, such as its difficulty."""
    order: Literal["ascending", "descending"] = "ascending"
    """Order of the prompts in each epoch, by that number; equal ones as ``data.shuffle`` says."""
    bands: Several[Annotated[tuple[float, float], Field(strict=False)]] = ()
    """Instead of an order: smallest and largest number of the prompts that are drawn from, one pair
    after the other, such as ``[[0, 2], [1, 4], [0, 5]]``."""
    band_steps: Several[Annotated[int, Field(gt=0)]] = ()
    """Steps for which each of ``bands`` lasts, but for the last one, which stays."""

    def band_of(self, step: int) -> int:
        """Return which of ``bands`` a step (from 1) draws from.

        Example: with ``band_steps = (2, 3)`` steps 1 to 7 draw from 0, 0, 1, 1, 1, 2 and 2.
        """
        ends = [sum(self.band_steps[: n + 1]) for n in range(len(self.band_steps))]
        return sum(step > end for end in ends)
