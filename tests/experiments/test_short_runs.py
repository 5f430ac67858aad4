"""The page of short runs has a row for each line of its results, and a killed run has no line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))

import short_runs


def test_every_line_of_the_results_is_a_row_of_the_page():
    results = short_runs.read_results()
    written = (Path(short_runs.PAGE)).read_text()
    assert written == short_runs.page(results)
    rows = [line for line in written.splitlines() if line.startswith("| ")]
    headings = [row for row in rows if row.startswith("| run |")]
    assert len(rows) - len(headings) == len(results) > 50
    # The control: a figure that changes is a page that changes.
    name, mode = next(key for key, line in results.items() if "k3" in line)
    other = results | {(name, mode): results[name, mode] | {"k3": 0.5}}
    assert "5.00e-01" in short_runs.page(other)
    assert "5.00e-01" not in written


def test_a_run_that_stopped_is_a_row_with_its_reason():
    line = {"variant": "dapo", "mode": "R3", "commit": "abc", "stopped": "step 3, DivergedError: x"}
    made = short_runs.page({("dapo", "R3"): line})
    assert "| dapo | R3 | stopped: step 3, DivergedError: x |" in made
    assert made.count("| abc |") == 1


def test_a_run_that_was_killed_is_not_measured(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "reward": 0.5}) + "\n")
    with pytest.raises(SystemExit, match="was killed"):
        short_runs.measured(tmp_path)
