"""Where datasets and reward functions are: prefixes, and paths that start at a folder."""

from __future__ import annotations

import os
from pathlib import Path

GENERATED = "reasoning_gym:"
"""Prefix of a dataset that is generated instead of read."""
HUB = "hf:"
"""Prefix of a dataset of the Hugging Face hub, read by the package ``datasets``."""
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".arrow")
"""Endings of dataset files that can be read."""


def has_splits(location: str) -> bool:
    """Return whether a dataset may hold several splits: all but single files and generated ones."""
    return not location.startswith(GENERATED) and (
        location.startswith(HUB) or Path(location).suffix not in SUFFIXES
    )


def anchored(path: str, folder: Path) -> str:
    """Return a path that starts at ``folder`` unless it is absolute."""
    # Without normpath the summary would show recipes/demo/../../runs/demo; links stay as they are.
    return os.path.normpath(folder / Path(path).expanduser())


def anchored_dataset(location: str, folder: Path) -> str:
    """Return a dataset's location, anchored where it is a path."""
    return location if location.startswith((GENERATED, HUB)) else anchored(location, folder)


def anchored_function(name: str, folder: Path) -> str:
    """Return a reward function's name with the file of its module, where that lies in ``folder``.

    Examples:
        >>> anchored_function("rewards:score", Path("/recipes"))  # with /recipes/rewards.py
        '/recipes/rewards.py:score'
    """
    module, _, function = name.rpartition(":")
    file = module if module.endswith(".py") else _module_file(module, folder)
    return f"{anchored(file, folder)}:{function}" if file else name


def _module_file(module: str, folder: Path) -> str | None:
    """Return the file of a module relative to ``folder``; None for one that is elsewhere."""
    parts = module.split(".")
    if not all(part.isidentifier() for part in parts):
        return None
    for file in (Path(*parts).with_suffix(".py"), Path(*parts) / "__init__.py"):
        if (folder / file).is_file():
            return str(file)
    return None
