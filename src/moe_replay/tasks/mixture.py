"""Prompts of several datasets, drawn by weight: the same ones in every process and every resume.

Each position has a draw of its own, of the run's seed, that says which dataset it comes from; there
it takes the next prompt::

    position   0  1  2  3  4  5        datasets a and b of equal weight
    draw       a  b  b  a  b  b
    prompt     a0 b0 b1 a1 b2 b3       a dataset that ends begins an epoch of its own

A run that is resumed with other weights or datasets goes on in each where it was, see
`MixedPrompts.go_on`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from jaxtyping import Int64

from moe_replay.tasks.encoding import Prompt
from moe_replay.tasks.prompts import PromptSource

_BLOCK = 4096
# Keeps these draws apart from others of the run's seed.
_PURPOSE = 0x6D69787475726500


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One dataset of a mixture."""

    name: str
    """In metrics, and of its prompts."""
    weight: float
    """How often it is drawn from, in proportion to the others."""
    source: PromptSource
    """Its prompts."""


class MixedPrompts:
    """The prompts of several datasets, in a random order of their own."""

    def __init__(self, parts: Sequence[Part], *, seed: int) -> None:
        """Take the datasets, and the seed of the draws."""
        self.parts = tuple(parts)
        self._seed = seed
        bounds = np.cumsum([part.weight for part in parts])
        # Bounds of shares; the last one is exactly 1, which no draw reaches.
        self._bounds = tuple((bounds / bounds[-1]).tolist())
        # Of each finished block: draws of each part before it.
        self._before = [np.zeros(len(parts), dtype=np.int64)]
        # From a position on: by how many draws each part is ahead of what these draws give.
        self._start = 0
        self._ahead = np.zeros(len(parts), dtype=np.int64)
        # Draws of datasets that are in the mixture no more.
        self._left: dict[str, int] = {}

    @property
    def num_prompts(self) -> int | None:
        """None: each dataset begins again when it ends."""
        return None

    @property
    def num_deleted(self) -> int:
        """Prompts of all datasets omitted so far because they are too long."""
        return sum(part.source.num_deleted for part in self.parts)

    @property
    def columns(self) -> frozenset[str]:
        """Columns that some dataset has; the prompts of the others have None there."""
        return frozenset().union(*(part.source.columns for part in self.parts))

    def at(self, position: int, count: int, *, step: int = 1) -> list[Prompt]:
        """Return the prompts from ``position`` on."""
        drawn, before = self._drawn(position, count)
        nothing = dict.fromkeys(self.columns)
        own: list[list[Prompt]] = []
        for number, part in enumerate(self.parts):
            size = int((drawn == number).sum())
            taken = part.source.at(int(before[number]), size, step=step) if size else []
            own.append([replace(p, columns={**nothing, **p.columns}) for p in taken])
        waiting = [iter(each) for each in own]
        return [next(waiting[number]) for number in drawn.tolist()]

    def draws(self, position: int) -> dict[str, int]:
        """Return the draws of each dataset before a position, also of those that were left out."""
        _, before = self._drawn(position, 0)
        now = {part.name: int(n) for part, n in zip(self.parts, before, strict=True)}
        return self._left | now

    def go_on(self, position: int, draws: Mapping[str, int]) -> None:
        """Go on from ``position``, before which each dataset was drawn from ``draws`` times.

        `draws` gave them, maybe with other weights or datasets. One that is not there begins.
        """
        names = [part.name for part in self.parts]
        self._start, self._ahead = 0, np.zeros(len(names), dtype=np.int64)
        _, before = self._drawn(position, 0)
        given = np.array([draws.get(name, 0) for name in names], dtype=np.int64)
        self._start, self._ahead = position, given - before
        self._left = {name: n for name, n in draws.items() if name not in names}

    def _drawn(
        self, position: int, count: int
    ) -> tuple[Int64[np.ndarray, " count"], Int64[np.ndarray, " parts"]]:
        """Return the part that each position is drawn from, and draws of each part before these."""
        assert position >= self._start, "draws before the resume are not known"
        block, first = divmod(position, _BLOCK)
        while len(self._before) <= block:
            whole = _draws(self._bounds, self._seed, len(self._before) - 1)
            self._before.append(self._before[-1] + self._counts(whole))
        last = (position + count - 1) // _BLOCK
        draws = [_draws(self._bounds, self._seed, each) for each in range(block, last + 1)]
        every = np.concatenate([np.zeros(0, dtype=np.int64), *draws])
        before = self._before[block] + self._counts(every[:first])
        return every[first : first + count], before + self._ahead

    def _counts(self, draws: Int64[np.ndarray, " draws"]) -> Int64[np.ndarray, " parts"]:
        return np.bincount(draws, minlength=len(self.parts)).astype(np.int64)


@lru_cache(maxsize=4)
def _draws(bounds: tuple[float, ...], seed: int, block: int) -> Int64[np.ndarray, " draws"]:
    uniform = np.random.default_rng([seed, _PURPOSE, block]).random(_BLOCK)
    return np.searchsorted(np.array(bounds), uniform, side="right").astype(np.int64)
