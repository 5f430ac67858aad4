"""What each replay mode means for each pass: one table, which the README repeats."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moe_replay.routing import ReplayMode, Routing
from moe_replay.routing.replay import PASSES

README = Path(__file__).parents[2] / "README.md"
LIVE, RECORD, REPLAY = Routing.LIVE, Routing.RECORD, Routing.REPLAY


def rows(page: str) -> dict[str, tuple[str, str]]:
    """Return mode -> (where routes come from, where they are replayed) of a page's table."""
    table = page.partition("\n`router_replay_mode` |")[2].partition("\n\n")[0]
    found = re.findall(r"^`(\w+)` \| (.+) \| (.+)$", table, re.MULTILINE)
    return {mode: (source, where) for mode, source, where in found}


TABLE = {mode.value: (row.recorded_by, row.replayed_in) for mode, row in PASSES.items()}


@pytest.mark.parametrize(
    ("mode", "engine", "old", "update", "reference"),
    [
        (ReplayMode.DISABLED, LIVE, LIVE, LIVE, LIVE),
        (ReplayMode.R2, LIVE, RECORD, REPLAY, REPLAY),
        (ReplayMode.R3, RECORD, REPLAY, REPLAY, REPLAY),
    ],
)
def test_a_mode_says_what_every_pass_does(
    mode: ReplayMode, engine: Routing, old: Routing, update: Routing, reference: Routing
) -> None:
    row = mode.passes
    assert (row.engine, row.old, row.update, row.reference) == (engine, old, update, reference)
    assert mode.replays == (update is REPLAY)


def test_every_mode_has_a_row() -> None:
    assert set(PASSES) == set(ReplayMode)


def test_what_is_replayed_was_recorded_before() -> None:
    for row in PASSES.values():
        passes = [row.engine, row.old, row.update]
        if REPLAY in passes:
            assert RECORD in passes[: passes.index(REPLAY)]


def test_the_table_of_the_readme_is_the_table_of_modes() -> None:
    assert rows(README.read_text()) == TABLE


def test_another_table_is_seen_as_another() -> None:
    edited = README.read_text().replace("| the update\n", "| every pass\n")
    assert rows(edited) != TABLE
    without_a_row = re.sub(r"^`R2` .*\n", "", README.read_text(), flags=re.MULTILINE)
    assert rows(without_a_row) != TABLE
