"""The benchmarks run and print their figures last, a JSON object a line, under the known names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def printed(script: str, *arguments: str) -> list[str]:
    """Run a benchmark in a process of its own and return its lines."""
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, *arguments],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_megatron_replay_prints_its_three_figures() -> None:
    figures = [
        json.loads(line) for line in printed("megatron_replay.py", "--quick", "--pairs", "2")[-3:]
    ]
    assert [figure["metric"] for figure in figures] == [
        "replay.step_ratio",
        "record.pass_ratio",
        "replay.resident_bytes_ratio",
    ]
    assert all(figure["unit"] == "ratio" for figure in figures)
    assert 1.0 <= figures[2]["value"] < 1.1


def test_balance_prints_both_figures_and_reaches_its_goal() -> None:
    figures = {f["metric"]: f["value"] for f in map(json.loads, printed("balance.py")[-2:])}
    assert figures.keys() == {"balance.by_position_ratio", "balance.slowest_ratio"}
    assert 1.0 < figures["balance.slowest_ratio"] <= 1.02 < figures["balance.by_position_ratio"]


def test_gpu_replay_runs_on_a_cpu_and_claims_nothing() -> None:
    lines = printed("gpu_replay.py", "--quick", "--layers", "2")
    assert "say nothing about a GPU" in lines[0]
    assert not any("gpu." in line for line in lines[1:])


def test_e7_opening_a_rollout_takes_next_to_no_memory() -> None:
    lines = printed("rollout_files.py", "--quick", "--length", "256")
    figures = {row["metric"]: row["value"] for row in map(json.loads, lines[1:])}
    # The first format took 105 bytes a token; the control is that a step's groups do take memory
    # when they are read.
    assert figures["rollout_files.open_anonymous_bytes_per_token"] < 8
    assert figures["rollout_files.step_anonymous_bytes_per_token"] > 20


def test_guard_prints_its_three_figures() -> None:
    lines = printed("guard.py", "--quick", "--tiny", "--pairs", "2", "--clean-steps", "1")
    figures = [json.loads(line) for line in lines[-3:]]
    assert [figure["metric"] for figure in figures] == [
        "guard.step_ratio",
        "guard.miss_rate",
        "guard.false_alarms",
    ]
    assert figures[1]["value"] == figures[2]["value"] == 0


def test_the_table_of_the_guard_is_measured_and_put_into_its_page(tmp_path: Path) -> None:
    page = tmp_path / "guard.md"
    page.write_text("before\n<!-- guard-power: begin -->\nold\n<!-- guard-power: end -->\nafter\n")
    lines = printed(
        "guard_power.py",
        *("--only", "64,6,6", "--agreement", "0.92", "--draws", "1", "--longest", "24"),
        *("--causes", "one row late", "a tenth of the rows random", "--write", str(page)),
    )
    found = {row["metric"]: row["value"] for row in map(json.loads, lines[-2:])}
    late, strewn = found.values()
    # Every row late shows in a dozen of them; two random rows of 24 show nowhere: the control.
    assert late in (8, 12, 16) and strewn is None
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert f"| one token late | **{late}** |" in text
    assert "| a tenth of the rows random | not found, - |" in text


def test_strewn_rows_are_found_in_few_samples_and_in_a_fifth_of_them() -> None:
    lines = printed(
        "guard_power.py",
        *("--strewn", "128", "--only", "64,6,6", "--draws", "1", "--shares", "0.02", "0.2", "0.7"),
    )
    found = {row["metric"]: row["value"] for row in map(json.loads, lines)}
    for memory in ("first_step", "after_3_clean_steps"):
        assert found[f"guard_power.strewn_64-6-6_0.02_{memory}"] == 1
        assert found[f"guard_power.strewn_64-6-6_0.2_{memory}"] == 1
    # Control: in most samples they are the usual, as long as no earlier step says otherwise.
    assert found["guard_power.strewn_64-6-6_0.7_first_step"] == 0
    assert found["guard_power.strewn_64-6-6_0.7_after_3_clean_steps"] > 0.8


def test_clean_steps_of_the_guard_are_counted() -> None:
    lines = printed("guard_power.py", "--only", "8,2,4", "--clean", "30")
    found = {row["metric"]: row["value"] for row in map(json.loads, lines)}
    assert found["guard_power.clean_steps_8-2-4"] == 30
    assert found["guard_power.false_alarms_8-2-4"] == 0


def test_overlap_prints_its_two_figures() -> None:
    lines = printed("overlap.py", "--quick", "--delay", "0.2", "--steps", "4")
    figures = [json.loads(line) for line in lines[-2:]]
    assert [figure["metric"] for figure in figures] == ["overlap.step_ratio", "overlap.reward_gap"]
    assert figures[0]["value"] > 0
    assert "held back for 0.2 s" in lines[-3]


def test_a_step_beside_trls_prints_its_figures() -> None:
    lines = printed("grpo_step.py", "--mixes", "equal", "--steps", "2", "--samples", "16")
    figures = {row["metric"]: row["value"] for row in map(json.loads, lines[-3:])}
    assert list(figures) == [
        "grpo.vs_trl_ratio",
        "grpo.vs_trl_wall_ratio",
        "grpo.other_stations_frac",
    ]
    assert all(figures[name] > 0 for name in ("grpo.vs_trl_ratio", "grpo.vs_trl_wall_ratio"))
    assert 0 < figures["grpo.other_stations_frac"] < 1
    # Both sides sampled what was drawn: 16 completions of 32 tokens.
    assert any(line.startswith("equal: 512 sampled tokens a step") for line in lines)
