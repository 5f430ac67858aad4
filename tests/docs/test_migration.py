"""docs/migration.md names keys that exist: ours, and those of the TRL that is installed."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from moe_replay.recipe.keys import FIELDS

PAGE = Path(__file__).parents[2] / "docs" / "migration.md"
# Arguments of TRL's trainers and of transformers' own TrainingArguments by another road.
ARGUMENTS = {"environment_factory", "tools", "peft_config", "reward_funcs", "model"}


def _rows() -> list[list[str]]:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if row[0] != "here" and set(row[0]) != {"-"}]


def _unknown(rows: list[list[str]]) -> list[str]:
    """Return the first column's dotted keys that no recipe has."""
    found = []
    for row in rows:
        for section, key in re.findall(r"`([a-z]+)\.([a-z_]+)[^`]*`", row[0]):
            if key.endswith("_"):  # recompute_*
                known = any(name.startswith(key) for name in FIELDS[section])
            else:
                known = key in FIELDS.get(section, {})
            if not known:
                found.append(f"{section}.{key}")
        found += [s for s in re.findall(r"`\[+([a-z]+)\]+`", row[0]) if s not in FIELDS]
    return found


def test_every_key_of_ours_exists():
    rows = _rows()
    assert len(rows) > 50
    assert all(len(row) == 5 for row in rows)
    assert _unknown(rows) == []
    # Control: a key with a wrong letter, in one row.
    assert _unknown([*rows, ["`grpo.epsilonhigh`", "", "", "", ""]]) == ["grpo.epsilonhigh"]


def test_every_name_of_trl_exists_in_the_release_that_is_installed():
    from trl import GRPOConfig

    known = {field.name for field in dataclasses.fields(GRPOConfig)} | ARGUMENTS
    names = {
        name
        for row in _rows()
        for name in re.findall(r"`([a-z_]+)(?:=\"[a-z]+\")?`", row[4])
        # A loss type, not an option.
        if name != "dapo"
    }
    assert len(names) > 25
    assert names - known == set()
