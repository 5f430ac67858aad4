"""What a rule between keys of a recipe is, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from moe_replay.errors import RecipeError, UnsupportedError
from moe_replay.recipe.bearer import without_secrets


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


def problems_error(problems: Sequence[Problem], where: str) -> RecipeError:
    """Return one error that names all problems of a recipe, of which there is at least one.

    It is an `UnsupportedError` if each of them only cannot be honoured.
    """
    lines = [f"  {problem.path}: {problem.text}" for problem in problems]
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    message = without_secrets("\n".join([f"{where} has {count}:", *lines]))
    if all(problem.is_unsupported for problem in problems):
        return UnsupportedError(message)
    return RecipeError(message)
