"""The tables of docs/megatron.md about Megatron's own options are those of the code."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

import moe_replay.megatron  # noqa: F401 - silences Megatron-Core's own imports
from moe_replay.megatron.options.needs import NEEDS
from moe_replay.megatron.replay.refusals import REFUSALS
from moe_replay.recipe.options.decided import DECIDED
from moe_replay.recipe.options.refused import REFUSED

PAGE = Path(__file__).parents[2] / "docs" / "megatron.md"


def _markdown(heads: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    lines = [f"| {heads[0]} | {heads[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {left} | {right} |" for left, right in rows)])


def _names(table: str, fields: Iterable[str]) -> str:
    return f"{table}: " + ", ".join(f"`{name}`" for name in fields)


def decided_table() -> str:
    rows = ((_names(row.table, row.fields), row.by) for row in DECIDED)
    return _markdown(("fields", "decided by"), rows)


def refused_table() -> str:
    rows = (
        (
            _names(row.table, row.fields) + (f" ({row.condition})" if row.condition else ""),
            row.why,
        )
        for row in REFUSED
    )
    return _markdown(("fields", "why"), rows)


def replay_table() -> str:
    return _markdown(("option", "why"), ((f"`{row.option}`", row.why) for row in REFUSALS))


def needs_table() -> str:
    rows = ((_names(row.table, row.fields), row.what) for row in NEEDS)
    return _markdown(("fields", "need"), rows)


@pytest.mark.parametrize("table", [decided_table, refused_table, replay_table, needs_table])
def test_the_page_has_every_table_of_the_code(table):
    assert table() in PAGE.read_text(), f"put the output of {table.__name__}() into {PAGE.name}"


def test_a_table_that_is_not_of_the_code_is_noticed():
    assert refused_table().replace("dropout", "drop-out") not in PAGE.read_text()
