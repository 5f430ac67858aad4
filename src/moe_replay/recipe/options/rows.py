"""The rows of the tables about Megatron's own options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Decided(NamedTuple):
    """Fields that something else decides."""

    table: str
    """``transformer``, ``ddp`` or ``optimizer``."""
    by: str
    """What decides them, and is to be set instead."""
    fields: tuple[str, ...]
    """Megatron's names."""


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


class Refused(NamedTuple):
    """An option that is not honoured, with replay or without."""

    table: str
    """``transformer``, ``ddp`` or ``optimizer``."""
    fields: tuple[str, ...]
    """Megatron's names."""
    why: str
    """The reason."""
    values: Callable[[Any], bool] = bool
    """Which values are refused; by default all but those that switch it off."""
    condition: str = ""
    """Those values in words; empty for all that switch it on."""


class Switch(NamedTuple):
    """Fields that do nothing unless another one is set."""

    table: str
    """``transformer``, ``ddp`` or ``optimizer``."""
    fields: tuple[str, ...]
    """Megatron's names."""
    needs: str
    """The switch, by its dotted name below ``megatron``."""
    value: Any = True
    """What it has to be; None for anything that is set."""


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def names(text: str) -> tuple[str, ...]:
    """Return the words of a text.

    Examples:
        >>> names("fp8 fp4")
        ('fp8', 'fp4')
    """
    return tuple(text.split())
