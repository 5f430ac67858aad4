"""Endless items of a reasoning-gym family, each determined by a seed and its index.

reasoning-gym seeds item i of a dataset with seed + i, so the datasets of seeds 1 and 2 are the same
items shifted by one. Here every block of items has its own seed, derived from a digest, so
sequences overlap only by chance.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from moe_replay.errors import RecipeError, UnsupportedError

_BLOCK = 256
# Families that pass seed + i to numpy need it below 2**32.
_NUM_SEEDS = 2**32 - 2 * _BLOCK
_HASH_ORDERED = frozenset(
    {
        "isomorphic_strings",
        "knight_swap",
        "list_functions",
        "polynomial_multiplication",
        "ransom_note",
        "word_ladder",
    }
)


class GeneratedTask:
    """A family of generated items with its configuration; it also scores answers to them."""

    def __init__(self, family: str, config: Mapping[str, Any]) -> None:
        self.name = f"reasoning_gym:{family}"
        """Its spelling in a recipe."""
        self.family = family
        """Name of the family."""
        self.config = config
        """Its configuration, as given."""
        self._config = _checked_config(family, config)
        self._block = lru_cache(maxsize=16)(self._make_block)
        self._scorer = self._make_block(0)
        self._refuse_unrepeatable()

    def item(self, seed: int, number: int, *, replacement: int = 0) -> dict[str, Any]:
        """Return an item: ``question``, ``answer`` and ``metadata``.

        ``replacement`` above 0 selects another item for the same index.
        """
        block, offset = divmod(number, _BLOCK)
        digest = hashlib.sha256(f"{seed}:{block}:{replacement}".encode()).digest()
        return self._block(int.from_bytes(digest[:8]) % _NUM_SEEDS)[offset]

    def score(self, answer: str, item: Mapping[str, Any]) -> float:
        """Return the family's own score of an answer, 0 to 1."""
        return float(self._scorer.score_answer(answer, dict(item)))

    def _make_block(self, seed: int) -> Any:
        import reasoning_gym

        try:
            return reasoning_gym.create_dataset(self.family, **self._config, seed=seed, size=_BLOCK)
        except (AssertionError, TypeError, ValueError) as error:
            raise RecipeError(
                f"data.task {dict(self._config)!r} is rejected by {self.name}: {error}"
            ) from error

    def _refuse_unrepeatable(self) -> None:
        families = {self.family, *(spec.name for spec in self._config.get("datasets", ()))}
        unrepeatable = sorted(families & _HASH_ORDERED)
        if unrepeatable and sys.flags.hash_randomization:
            raise UnsupportedError(
                f"{self.name}: {', '.join(unrepeatable)} draws items in the order of a Python set, which differs "
                "between processes: ranks and resumed runs would see other prompts. Start Python with "
                "PYTHONHASHSEED=0"
            )


def _checked_config(family: str, config: Mapping[str, Any]) -> dict[str, Any]:
    from reasoning_gym.factory import DATASETS

    if family not in DATASETS:
        close = difflib.get_close_matches(family, DATASETS, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(DATASETS)}"
        raise RecipeError(f"reasoning_gym has no family {family!r}; {hint}")
    known = {field.name for field in dataclasses.fields(DATASETS[family][1])} - {"seed", "size"}
    unknown = [key for key in config if key not in known]
    if unknown:
        raise RecipeError(
            f"data.task sets {', '.join(unknown)}, but reasoning_gym:{family} knows {', '.join(sorted(known))} "
            "(seeds are data.train_seed and data.eval_seed, the held-out size is data.eval_size)"
        )
    if family != "composite":
        return dict(config)
    return {**config, "datasets": [_composite_part(part) for part in config.get("datasets", [])]}


def _composite_part(part: Any) -> Any:
    from reasoning_gym.composite import DatasetSpec

    if (
        not isinstance(part, dict)
        or "name" not in part
        or set(part) - {"name", "weight", "config"}
        or not isinstance(part.get("config", {}), dict)
    ):
        raise RecipeError(
            f"data.task.datasets: got {part!r}, expected a table with name and, optionally, weight and config"
        )
    # Sizes and seeds come from the item's block, or the same items would repeat.
    config = _checked_config(part["name"], part.get("config", {}))
    return DatasetSpec(name=part["name"], weight=part.get("weight", 1.0), config=config)
