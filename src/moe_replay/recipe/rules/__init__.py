"""The rules between keys of a recipe: contradictions, impossible layouts, and keys without effect.

A rule is a function whose parameters are the sections it needs. It runs when all of them are valid
by themselves and of the classes it names: a rule over `VllmEngineSection` is one for vLLM only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from moe_replay.recipe.rule import EffectRule, Problem, Rule
from moe_replay.recipe.rules import adapters, loss, mixing, running, scoring, turns
from moe_replay.recipe.sections.base import sections_for

_EVERY = [
    value
    for part in (running, mixing, scoring, adapters, loss, turns)
    for value in vars(part).values()
]
_RULES = tuple(value for value in _EVERY if isinstance(value, Rule))
_EFFECT_RULES = tuple(value for value in _EVERY if isinstance(value, EffectRule))


def rule_problems(sections: Mapping[str, Any]) -> list[Problem]:
    """Check every rule whose sections are all there; the caller omits those that are invalid."""
    return list(_found(_RULES, sections))


def effect_free_keys(sections: Mapping[str, Any]) -> dict[str, str]:
    """Dotted key -> reason, for every key that changes nothing given the other keys."""
    return dict(_found(_EFFECT_RULES, sections))


def _found(rules: Iterable[Rule | EffectRule], sections: Mapping[str, Any]) -> Iterator[Any]:
    for rule in rules:
        needed = sections_for(rule.check, sections)
        if needed is not None:
            yield from rule.check(**needed)
