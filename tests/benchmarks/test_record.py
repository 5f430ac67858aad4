"""docs/benchmarks.md is what the recorded lines give; a figure without a meaning is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import record
from commits import ROOT
from reproduction_results import keep_row, read_rows

ROW = {
    "row": "python benchmarks/balance.py --quick",
    "commit": "abc1234",
    "date": "2026-12-01",
    "machine": "A Processor",
    "cores": 2,
    "load": 0.5,
    "wall_s": 3.2,
    "processor_s": 2.9,
    "metrics": [{"metric": "balance.slowest_ratio", "value": 1.01234, "unit": "ratio"}],
}


def test_page_is_what_the_lines_give():
    assert record.PAGE.read_text() == record.page(), "run python benchmarks/record.py --page"


def test_every_benchmark_is_on_the_page(tmp_path):
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {"measure", "record"}
    page = record.page()
    absent = {name for name in scripts if f"- `benchmarks/{name}.py` " in page}
    shown = {name for name in scripts if f"## {name}\n" in page}
    assert absent | shown == scripts
    assert not absent & shown
    assert absent == record.ELSEWHERE.keys() | record.unrecorded(record.RESULTS)
    keep_row("balance", ROW, tmp_path)
    assert record.unrecorded(tmp_path) == scripts - record.ELSEWHERE.keys() - {"balance"}


def test_every_recorded_figure_has_a_meaning_and_a_goal():
    known = record.meanings()
    assert all(entry.keys() == {"means", "goal"} for entry in known.values())
    rows = [
        row
        for path in record.RESULTS.glob("*.jsonl")
        for row in read_rows(path.stem, record.RESULTS).values()
    ]
    assert len(rows) > 5
    found = {record.explained(figure["metric"]) for row in rows for figure in row["metrics"]}
    assert found - known.keys() == set()


def test_a_figure_is_shown_with_its_command_and_what_it_means(tmp_path):
    keep_row("balance", ROW, tmp_path)
    page = record.page(tmp_path)
    assert "| `balance.slowest_ratio` | 1.012 | ratio | The same with samples dealt" in page
    assert (
        "`python benchmarks/balance.py --quick`, 2026-12-01, at abc1234, A Processor, 2 cores, load 0.5: 3.2 s, "
        "2.9 s of processor time." in page
    )
    assert "## balance\n\nHow long the slowest replica computes" in page


def test_a_changed_figure_changes_the_page_and_a_second_run_replaces_the_first(tmp_path):
    keep_row("balance", ROW, tmp_path)
    before = record.page(tmp_path)
    other = {**ROW, "metrics": [{**ROW["metrics"][0], "value": 1.5}]}
    keep_row("balance", other, tmp_path)
    after = record.page(tmp_path)
    assert "| 1.5 |" in after
    assert after.replace("| 1.5 |", "| 1.012 |") == before
    keep_row("balance", {**ROW, "row": "python benchmarks/balance.py"}, tmp_path)
    assert record.page(tmp_path).count("`balance.slowest_ratio`") == 2


def test_a_benchmark_is_run_and_its_figures_are_kept(tmp_path, capsys):
    record.record("balance", ["--quick"], tmp_path)
    (line,) = (tmp_path / "balance.jsonl").read_text().splitlines()
    row = json.loads(line)
    printed = capsys.readouterr().out.splitlines()
    assert row["metrics"] == [json.loads(text) for text in printed if "metric" in text]
    assert {figure["metric"] for figure in row["metrics"]} == {
        "balance.by_position_ratio",
        "balance.slowest_ratio",
    }
    assert row["row"] == "python benchmarks/balance.py --quick"
    assert row["processor_s"] > 0
    assert (
        row["commit"].rstrip("+")
        == subprocess.run(
            ["git", "rev-parse", "--short=7", "HEAD"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()
    )


@pytest.mark.parametrize(
    ("name", "arguments", "problem"),
    [
        ("balance", ["--quik"], "ended with 2; nothing is kept"),
        ("balanced", [], "there is no benchmarks/balanced.py"),
        ("gpu_replay", [], "needs a GPU"),
    ],
)
def test_a_run_that_fails_keeps_nothing(name, arguments, problem, tmp_path):
    with pytest.raises(SystemExit, match=problem):
        record.record(name, arguments, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_figure_without_a_meaning_is_refused(tmp_path, monkeypatch):
    known = record.meanings()
    del known["balance.by_position_ratio"]
    monkeypatch.setattr(record, "meanings", lambda: known)
    with pytest.raises(SystemExit, match="by_position_ratio; every figure needs an entry"):
        record.record("balance", ["--quick"], tmp_path)
    assert list(tmp_path.iterdir()) == []
