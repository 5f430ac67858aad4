"""GRPO for mixture-of-experts models, trained through the experts that the rollout used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from moe_replay.report import RunDirectory

__version__ = "0.1.0"


def train(
    recipe: Path | str | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    *,
    restart: bool = False,
) -> RunDirectory:
    """Train by a recipe, a TOML file or its tables, and return the run directory.

    Does what `moe-replay train` does, from a notebook or a script: see
    `moe_replay.cli.train.train_recipe`.

    Examples:
        >>> run = moe_replay.train("recipe.toml", {"run.max_steps": 5, "optimizer.lr": 1e-5})
        >>> run.read_steps()[-1].metrics["reward"]
        0.5625

    Raises:
        MoeReplayError: of the kind that names what went wrong.
    """
    from moe_replay.cli.train import train_recipe

    return train_recipe(recipe, overrides, restart=restart)
