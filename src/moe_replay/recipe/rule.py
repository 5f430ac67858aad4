"""What a rule between keys of a recipe is, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple


class Problem(NamedTuple):
    """One thing that is wrong with a recipe."""

    path: str
    """Dotted key."""
    text: str
    """What was given, what was expected and what to do."""
    is_unsupported: bool = False
    """Whether the value makes sense but cannot be honoured."""


class Rule(NamedTuple):
    """Makes a function a rule: it yields what is wrong with the sections its parameters name."""

    check: Callable[..., Iterator[Problem]]


class EffectRule(NamedTuple):
    """Makes a function a rule that yields dotted keys without effect, each with the reason."""

    check: Callable[..., Iterator[tuple[str, str]]]
