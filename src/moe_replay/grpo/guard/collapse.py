"""Collapsed routers: layers whose live routing sends every token to the same experts.

Reinforcement learning does this to small models, and too high a learning rate to any. Such a run
goes on: its routes are right. It is counted, because the layer has stopped being a mixture.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64

from moe_replay.megatron.replay.overlap import RouteUse
from moe_replay.recipe.recipe import Recipe

_SHARE, _MIN_ROWS, _MIN_TOKENS = 0.99, 32, 8
"""Share of the replayed rows that must choose the same set, of at least so many rows and tokens.

Routes of a few rows, or of one repeated token, are rightly alike.
"""


class LiveSets:
    """Counts how many rows choose the favourite expert set of their microbatch, layer by layer."""

    def __init__(self) -> None:
        self._rows: Counter[int] = Counter()
        self._sets: dict[int, Counter[tuple[int, ...]]] = defaultdict(Counter)
        self._tokens: set[int] = set()

    def add(self, use: RouteUse, token_ids: Int64[np.ndarray, " rows"]) -> None:
        """Take the favourites of a microbatch, whose counted rows hold ``token_ids``."""
        self._tokens.update(np.unique(token_ids).tolist())
        for layer, chosen, times in zip(
            use.layers, use.favourite, use.favourite_times, strict=True
        ):
            self._rows[layer] += use.num_rows
            self._sets[layer][tuple(chosen.tolist())] += int(times)

    def to_plain(self) -> dict[str, Any]:
        """Return what other ranks need: the tokens, and each layer's rows and favourite set."""
        return {
            "tokens": len(self._tokens),
            "layers": [
                [layer, self._rows[layer], *sets.most_common(1)[0]]
                for layer, sets in self._sets.items()
            ],
        }

    @staticmethod
    def collapsed(parts: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the collapsed layers of all ranks' counts.

        A set that nearly all rows choose is the favourite of nearly every microbatch and rank, so
        favourites suffice.
        """
        rows: Counter[int] = Counter()
        favourites: dict[int, Counter[tuple[int, ...]]] = defaultdict(Counter)
        for part in parts:
            for layer, count, chosen, times in part["layers"]:
                rows[layer] += count
                favourites[layer][chosen] += times
        if max((part["tokens"] for part in parts), default=0) < _MIN_TOKENS:
            return []
        return sorted(
            layer
            for layer, count in rows.items()
            if count >= _MIN_ROWS and max(favourites[layer].values()) >= _SHARE * count
        )


def collapse_warning(layers: Sequence[int], recipe: Recipe) -> str:
    """Return the warning about collapsed layers."""
    balance = recipe.megatron.moe_aux_loss_coeff
    return (
        f"layers {list(layers)} send every token to the same experts: their routers have collapsed. "
        "The routes are right and the run goes on, but these layers are no longer a mixture; "
        f"optimizer.lr = {recipe.optimizer.lr:g} may be too high, and megatron.moe_aux_loss_coeff = "
        f"{balance:g} {'too low' if balance else 'balances nothing'}"
    )
