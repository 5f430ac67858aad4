"""Which prompts of a file a step draws from, and in which order: by a number of each prompt.

Positions count the prompts of the run, whatever band they were drawn from: position p of a band of
n prompts is number p % n of the band's epoch p // n. So a prompt follows from position and step
alone, a resumed run goes on exactly, and within an epoch of a band no prompt comes twice. A band is
entered in the middle of an epoch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from moe_replay.errors import RecipeError
from moe_replay.recipe.sections.mixture import CurriculumSection
from moe_replay.tasks.chat_messages import excerpt


@dataclass(frozen=True, slots=True, kw_only=True)
class Curriculum:
    """The prompts of one dataset under a curriculum. Make one with `open_curriculum`."""

    section: CurriculumSection
    """``[curriculum]``."""
    values: Float64[np.ndarray, " prompts"]
    """``[prompts]`` number of each prompt."""

    def band_of(self, step: int) -> int:
        """Return the index of the band that a step (from 1) draws from; 0 without bands."""
        return self.section.band_of(step) if self.section.bands else 0

    def chosen(self, band: int) -> Int64[np.ndarray, " chosen"]:
        """Return the indices of the prompts of a band; all of them without bands."""
        if not self.section.bands:
            return np.arange(len(self.values))
        low, high = self.section.bands[band]
        return np.flatnonzero((self.values >= low) & (self.values <= high))

    def ordered(self, prompts: Int64[np.ndarray, " chosen"]) -> Int64[np.ndarray, " chosen"]:
        """Return prompts, given in the order of an epoch, in that of the curriculum.

        Those with equal numbers stay in the order given.
        """
        if self.section.bands:
            return prompts
        sign = 1 if self.section.order == "ascending" else -1
        return prompts[np.argsort(sign * self.values[prompts], kind="stable")]


def open_curriculum(
    section: CurriculumSection, values: Float64[np.ndarray, " prompts"], location: str
) -> Curriculum:
    """Return the curriculum of a dataset.

    Raises:
        RecipeError: a band has no prompt.
    """
    for number, (low, high) in enumerate(section.bands):
        if not ((values >= low) & (values <= high)).any():
            raise RecipeError(
                f"curriculum.bands.{number}: {location} has no prompt whose {section.column} is from {low:g} to "
                f"{high:g}; its numbers go from {values.min():g} to {values.max():g}: widen the band"
            )
    return Curriculum(section=section, values=values)


def number_in(value: Any, column: str, where: str) -> float:
    """Return the number of a prompt, which a CSV file holds as text.

    Raises:
        RecipeError: it is not a finite number.
    """
    try:
        number = math.nan if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise RecipeError(
            f"{where}: column {column} holds {excerpt(value)}, expected a finite number, by which [curriculum] "
            "chooses prompts: fill the row, remove it, or name another column"
        )
    return number
