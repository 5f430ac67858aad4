"""Check `[megatron.transformer]`, `[megatron.ddp]` and `[megatron.optimizer]` against the tables.

Names and types are compared with the installed Megatron-Core in `moe_replay.megatron.options`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moe_replay.recipe.options.decided import DECIDED
from moe_replay.recipe.options.refused import REFUSED
from moe_replay.recipe.options.rows import Switch
from moe_replay.recipe.options.switches import SWITCHES

Tables = Mapping[str, Mapping[str, Any]]
"""``transformer``, ``ddp`` and ``optimizer`` -> field -> value, as a recipe says them."""


def option_problems(
    tables: Tables, dispatcher: str, own_keys: frozenset[str]
) -> Iterator[tuple[str, str, bool]]:
    """Yield (dotted key, what is wrong, whether it only cannot be honoured) for all three tables.

    ``dispatcher`` is ``megatron.moe_token_dispatcher_type``; ``own_keys`` are the keys of
    ``[megatron]`` itself that Megatron's TransformerConfig knows too.
    """
    for name in tables["transformer"]:
        if name in own_keys:
            yield (
                f"megatron.transformer.{name}",
                f"set beside megatron.{name}, which is the same option: keep one of the two",
                False,
            )
    for row in DECIDED:
        for name in _set(tables, row.table, row.fields):
            yield (
                f"megatron.{row.table}.{name}",
                f"set to {tables[row.table][name]!r}, but what decides it is {row.by}. Remove it",
                False,
            )
    for row in REFUSED:
        for name in _set(tables, row.table, row.fields):
            value = tables[row.table][name]
            if row.values(value):
                yield (
                    f"megatron.{row.table}.{name}",
                    f"{value!r} cannot be honoured: {row.why}. Remove it",
                    True,
                )
    for row in SWITCHES:
        for name in _set(tables, row.table, row.fields):
            if not _is_on(tables, dispatcher, row):
                value = "set" if row.value is None else repr(row.value).lower()
                wanted = f"megatron.{row.needs} is not {value}"
                yield (
                    f"megatron.{row.table}.{name}",
                    f"set to {tables[row.table][name]!r}, but it has no effect: {wanted}. Remove "
                    "it, or set that",
                    False,
                )


def _set(tables: Tables, table: str, fields: tuple[str, ...]) -> Iterator[str]:
    return (name for name in fields if name in tables[table])


def _is_on(tables: Tables, dispatcher: str, row: Switch) -> bool:
    table, dot, field = row.needs.partition(".")
    value = tables[table].get(field) if dot else dispatcher
    return value not in (None, False) if row.value is None else value == row.value
