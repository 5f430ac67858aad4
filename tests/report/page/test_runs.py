"""What is read from a run directory, and what is said of a folder that is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moe_replay.errors import CheckpointError, RunDirectoryError
from moe_replay.grpo.records import RunEnd, RunFailure
from moe_replay.report.page.runs import open_runs
from moe_replay.report.page.verdict import verdict_of


def test_a_finished_run_is_read_with_its_steps_evaluations_and_end(tmp_path, make_run):
    end = RunEnd(step=3, max_steps=3, stopped_by=None)
    (run,) = open_runs([make_run(tmp_path / "a", end=end)])
    assert (run.name, run.mode, run.max_steps, run.end) == ("a", "R3", 3, end)
    assert [record.metrics["reward"] for record in run.steps] == [0.1, 0.2, 0.3]
    assert [record.metrics["eval/reward"] for record in run.evaluations] == [0.25, 0.5]


def test_runs_are_named_by_as_much_of_their_paths_as_tells_them_apart(tmp_path, make_run):
    folders = [make_run(tmp_path / name, steps=1) for name in ("x/R3", "y/R3", "y/R2")]
    assert [run.name for run in open_runs(folders)] == ["x/R3", "y/R3", "y/R2"]
    assert [run.name for run in open_runs(folders[1:])] == ["R3", "R2"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("missing", "missing does not exist; expected the run.output_dir of a run"),
        ("runs/a/metrics.jsonl", "is a file, .*: its folder .*runs/a is one"),
        ("runs", "runs holds a, .*it holds runs, name them: a"),
        ("empty", "empty holds nothing, expected the run.output_dir"),
    ],
)
def test_what_is_no_run_directory_is_refused_with_what_is_there(given, said, tmp_path, make_run):
    make_run(tmp_path / "runs" / "a", steps=1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunDirectoryError, match=said):
        open_runs([tmp_path / given])


def test_a_run_that_is_named_twice_is_refused(tmp_path, make_run):
    folder = make_run(tmp_path / "a", steps=1)
    with pytest.raises(RunDirectoryError, match="is given 2 times"):
        open_runs([folder, folder])


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("recipe.toml", "[run", "recipe.toml is not TOML"),
        ("ended.json", "{", "ended.json is not JSON"),
        ("ended.json", "[]", "ended.json holds list, expected a JSON object"),
        ("failed.json", '{"step": 1}', "failed.json lacks kind, max_steps, message"),
    ],
)
def test_a_damaged_file_is_named(name, text, said, tmp_path, make_run):
    folder = make_run(tmp_path / "a", steps=1)
    (folder / name).write_text(text)
    with pytest.raises(RunDirectoryError, match=said):
        open_runs([folder])


def test_a_damaged_line_is_named_and_an_unfinished_last_one_is_not_yet_there(tmp_path, make_run):
    folder = make_run(tmp_path / "a", steps=2)
    metrics = folder / "metrics.jsonl"
    whole = metrics.read_bytes()
    metrics.write_bytes(whole[:-20])
    (run,) = open_runs([folder])
    assert [record.step for record in run.steps] == [1]
    metrics.write_bytes(b"oops\n" + whole)
    with pytest.raises(CheckpointError, match="line 1 is not a JSON object"):
        open_runs([folder])


def _verdict(folder: Path):
    (run,) = open_runs([folder])
    return verdict_of(run)


def test_the_verdict_of_a_healthy_run_says_what_the_guard_compared(tmp_path, make_run):
    verdict = _verdict(make_run(tmp_path / "a"))
    assert (verdict.level, verdict.headline) == ("good", "No misaligned sample")
    assert verdict.text == (
        "The guard compared every replayed row in 3 steps, at least 100 % of those that could be "
        "replayed."
    )
    facts = dict(verdict.facts)
    assert facts["Training reward"] == "0.1000 → 0.3000 (first and last 10 % of steps)"
    assert facts["Held-out"] == "0.2500 → 0.5000 (after steps 0 and 3)"
    assert facts["Lowest agreement"] == "97.00 %: step 1, sample 1 (dataset item 41)"
    assert facts["Steps"] == "3 of 3 steps; still running, or killed"


def test_steps_in_which_nothing_was_compared_are_never_called_aligned(tmp_path, make_run):
    (run,) = open_runs([make_run(tmp_path / "a")])

    def live(record):
        agrees = ("replay/agreement", "replay/flip_frac")
        kept = {n: v for n, v in record.metrics.items() if not n.startswith(agrees)}
        return replace(record, metrics=kept | {"replay/coverage": 0.0}, details={})

    first, second, third = run.steps
    none = verdict_of(replace(run, steps=tuple(map(live, run.steps))))
    assert (none.level, none.headline) == ("warning", "No route was compared")
    partly = replace(second, metrics=second.metrics | {"replay/coverage": 0.6})
    some = verdict_of(replace(run, steps=(first, partly, live(third))))
    assert (some.level, some.headline) == ("warning", "Routes were compared in 2 of 3 steps")
    assert "at least 60.00 % of those that could be replayed" in some.text
    all_of_them = verdict_of(replace(run, steps=(first, partly, third)))
    assert (all_of_them.level, "in 3 steps, at least 60.00 %" in all_of_them.text) == ("good", True)


def test_the_verdict_of_a_run_with_a_dropped_sample_names_step_and_sample(tmp_path, make_run):
    verdict = _verdict(make_run(tmp_path / "a", dropped_step=2))
    assert (verdict.level, verdict.headline) == (
        "bad",
        "Misaligned: 1 sample had routes of other tokens",
    )
    assert "step 2, sample 1 (dataset item 42)" in verdict.text
    assert dict(verdict.facts)["Lowest agreement"].startswith("60.00 %: step 2, sample 1 ")


@pytest.mark.parametrize(
    ("kind", "headline"),
    [
        ("MisalignmentError", "Misaligned: the guard stopped it in step 4"),
        ("DivergedError", "Stopped by an error in step 4"),
    ],
)
def test_the_verdict_of_a_run_that_failed_says_which_error(kind, headline, tmp_path, make_run):
    failure = RunFailure(step=4, max_steps=9, kind=kind, message="Sample 17 is off\nand more")
    verdict = _verdict(make_run(tmp_path / "a", failure=failure))
    assert (verdict.level, verdict.headline, verdict.message) == (
        "bad",
        headline,
        "Sample 17 is off\nand more",
    )
    assert verdict.text.startswith("Sample 17 is off.")


def test_runs_without_replay_without_steps_and_stopped_ones_are_told_apart(tmp_path, make_run):
    assert _verdict(make_run(tmp_path / "a", mode="disabled")).level == "plain"
    assert _verdict(make_run(tmp_path / "b", steps=0)).headline == "No step has finished"
    stopped = make_run(tmp_path / "c", end=RunEnd(step=3, max_steps=9, stopped_by="SIGINT"))
    assert "stopped by SIGINT; the same command continues" in dict(_verdict(stopped).facts)["Steps"]
