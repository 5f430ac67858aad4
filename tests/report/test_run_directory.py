"""What a run leaves behind, through crashes, resumption and a full disk."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from moe_replay.errors import CheckpointError, MoeReplayError
from moe_replay.grpo.records import CompletionRecord, EvalRecord, StepRecord
from moe_replay.report.run_directory import RunDirectory

RECIPE = "[run]\nmax_steps = 9\n"


def _step(number: int, seconds: float = 1.0) -> StepRecord:
    return StepRecord(
        step=number, metrics={"reward": number / 7, "loss": 0.1}, seconds={"rollout": seconds}
    )


def _completion(step: int, text: str = "4") -> CompletionRecord:
    return CompletionRecord(
        item=0,
        columns={"answer": "4"},
        step=step,
        prompt="2 + 2 =",
        completion=text,
        rewards={"accuracy": 1.0},
        reward=1.0,
        advantage=0.5,
        num_tokens=1,
        finish_reason="stop",
        policy_version=step - 1,
    )


def _opened(path: Path, *, last_step: int = 0) -> RunDirectory:
    run = RunDirectory(path)
    run.open(recipe_toml=RECIPE, last_step=last_step)
    return run


def _run_of(path: Path, steps: int) -> RunDirectory:
    run = _opened(path)
    run.write_evaluation(EvalRecord(step=0, metrics={"eval/reward": 0.25}, seconds=3.0))
    for number in range(1, steps + 1):
        run.write_step(_step(number), [_completion(number), _completion(number, "5")])
    return run


def _steps_in(file: Path) -> list[int]:
    return [json.loads(line)["step"] for line in file.read_text().splitlines()]


def test_a_new_run_is_laid_out_with_recipe_and_versions(tmp_path: Path) -> None:
    run = _opened(tmp_path / "a" / "b")
    assert (run.path / "recipe.toml").read_text() == RECIPE
    versions = json.loads((run.path / "versions.json").read_text())
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert versions["torch"].startswith("2.")
    assert run.checkpoints.is_dir()
    assert run.export.is_dir()


def test_a_step_is_one_line_with_seconds_kept_apart(tmp_path: Path) -> None:
    run = _run_of(tmp_path, 1)
    assert run.metrics.read_text() == (
        f'{{"step": 1, "loss": 0.1, "reward": {1 / 7!r}, "seconds": {{"rollout": 1.0}}}}\n'
    )


def test_a_completion_is_one_line_whatever_it_contains(tmp_path: Path) -> None:
    run = _opened(tmp_path)
    text = 'two\nlines, a "quote", a \u2028 separator, 数'
    run.write_step(_step(1), [_completion(1, text)])
    assert run.completions.read_bytes().count(b"\n") == 1
    assert json.loads(run.completions.read_bytes())["completion"] == text


def test_records_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    run = _run_of(tmp_path, 2)
    assert run.read_steps() == [_step(1), _step(2)]
    assert run.read_evaluations() == [
        EvalRecord(step=0, metrics={"eval/reward": 0.25}, seconds=3.0)
    ]


def test_resuming_from_the_start_cuts_every_step(tmp_path: Path) -> None:
    _run_of(tmp_path, 2)
    run = _opened(tmp_path, last_step=0)
    assert run.read_steps() == []
    assert run.completions.read_bytes() == b""


def test_a_run_can_be_read_without_opening_it(tmp_path: Path) -> None:
    _run_of(tmp_path, 2)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(RunDirectory(tmp_path).read_steps()) == 2
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_resuming_cuts_the_steps_after_the_checkpoint(tmp_path: Path) -> None:
    _run_of(tmp_path, 5)
    run = _opened(tmp_path, last_step=3)
    assert _steps_in(run.metrics) == [1, 2, 3]
    assert _steps_in(run.completions) == [1, 1, 2, 2, 3, 3]
    assert _steps_in(run.evaluations) == [0]


def test_a_resumed_run_leaves_the_bytes_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = _run_of(tmp_path / "whole", 5)
    _run_of(tmp_path / "cut", 4)
    cut = _opened(tmp_path / "cut", last_step=2)
    for number in (3, 4, 5):
        cut.write_step(_step(number), [_completion(number), _completion(number, "5")])
    assert cut.metrics.read_bytes() == whole.metrics.read_bytes()
    assert cut.completions.read_bytes() == whole.completions.read_bytes()


def test_other_seconds_change_only_the_seconds(tmp_path: Path) -> None:
    fast, slow = (_opened(tmp_path / n) for n in ("fast", "slow"))
    fast.write_step(_step(1, seconds=1.0), [])
    slow.write_step(_step(1, seconds=9.0), [])
    before = [run.metrics.read_text().split('"seconds"')[0] for run in (fast, slow)]
    assert before[0] == before[1]
    assert fast.metrics.read_text() != slow.metrics.read_text()


@pytest.mark.parametrize("left", [1, 20, -1])
def test_a_half_written_last_line_is_removed(tmp_path: Path, left: int) -> None:
    run = _run_of(tmp_path, 3)
    lines = run.metrics.read_bytes().splitlines(keepends=True)
    run.metrics.write_bytes(b"".join(lines[:2]) + lines[2][:left])
    assert [record.step for record in run.read_steps()] == [1, 2]
    resumed = _opened(tmp_path, last_step=2)
    assert resumed.metrics.read_bytes() == b"".join(lines[:2])
    assert resumed.missing_steps == ()


def test_a_last_line_cut_inside_a_character_is_removed(tmp_path: Path) -> None:
    run = _opened(tmp_path)
    run.write_step(_step(1), [_completion(1, "数")])
    whole = run.completions.read_bytes()
    run.completions.write_bytes(whole + whole[: whole.index("数".encode()) + 1])
    assert _opened(tmp_path, last_step=1).completions.read_bytes() == whole


def test_a_broken_line_in_the_middle_is_refused_with_its_number(tmp_path: Path) -> None:
    run = _run_of(tmp_path, 3)
    lines = run.metrics.read_bytes().splitlines(keepends=True)
    run.metrics.write_bytes(lines[0] + b"\0\0\0\n" + lines[2])
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 2"):
        _opened(tmp_path, last_step=3)
    assert run.metrics.read_bytes() == lines[0] + b"\0\0\0\n" + lines[2]


def test_steps_that_have_no_line_are_named(tmp_path: Path) -> None:
    _run_of(tmp_path, 2)
    run = _opened(tmp_path, last_step=4)
    assert run.missing_steps == (3, 4)


def test_resuming_with_another_recipe_keeps_the_earlier_one(tmp_path: Path) -> None:
    _run_of(tmp_path, 2)
    RunDirectory(tmp_path).open(recipe_toml=RECIPE + "seed = 1\n", last_step=2)
    RunDirectory(tmp_path).open(recipe_toml=RECIPE + "seed = 2\n", last_step=2)
    assert (tmp_path / "recipe.toml.until-step-2").read_text() == RECIPE
    assert (tmp_path / "recipe.toml").read_text() == RECIPE + "seed = 2\n"


def test_resuming_with_the_same_recipe_leaves_no_copies(tmp_path: Path) -> None:
    _run_of(tmp_path, 2)
    _opened(tmp_path, last_step=2)
    assert not [
        path for path in tmp_path.iterdir() if "until-step" in path.name or ".tmp" in path.name
    ]


def test_a_resumed_run_keeps_its_id_and_one_from_the_start_gets_another(tmp_path: Path) -> None:
    first = _run_of(tmp_path, 2).run_id
    assert _opened(tmp_path, last_step=2).run_id == first
    assert _opened(tmp_path, last_step=0).run_id != first


def test_an_evaluation_repeated_after_resuming_replaces_the_first(tmp_path: Path) -> None:
    run = _run_of(tmp_path, 0)
    run.write_evaluation(EvalRecord(step=5, metrics={"eval/reward": 0.5}, seconds=1.0))
    run.write_evaluation(EvalRecord(step=0, metrics={"eval/reward": 0.75}, seconds=1.0))
    assert {r.step: r.metrics["eval/reward"] for r in run.read_evaluations()} == {0: 0.75, 5: 0.5}


def test_a_metric_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    run = _opened(tmp_path)
    with pytest.raises(MoeReplayError, match="metric loss is nan"):
        run.write_step(StepRecord(step=1, metrics={"loss": math.nan}, seconds={}), [])
    assert not run.metrics.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_reported_with_path_and_free_bytes(tmp_path: Path) -> None:
    run = _opened(tmp_path)
    run.metrics.symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: No space left.*\d+ bytes are free"):
        run.write_step(_step(1), [])


def test_a_write_that_fails_halfway_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    run = _run_of(tmp_path, 3)
    before = run.completions.read_bytes()
    # In a process of its own: the limit on the size of files would hold for the test runner too.
    script = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parents[2] / "src")!r})
from moe_replay.errors import CheckpointError
from moe_replay.grpo.records import CompletionRecord, StepRecord
from moe_replay.report.run_directory import RunDirectory
run = RunDirectory({str(tmp_path)!r})
run.open(recipe_toml={RECIPE!r}, last_step=3)
limit = run.completions.stat().st_size + 100
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
completion = CompletionRecord(step=4, item=0, columns={{}}, prompt="p", completion="x" * 1000, rewards={{}}, reward=0.0, advantage=0.0,
    num_tokens=1, finish_reason="stop", policy_version=3)
try:
    run.write_step(StepRecord(step=4, metrics={{}}, seconds={{}}), [completion])
except CheckpointError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert "completions.jsonl: File too large" in done.stdout
    assert "resume" in done.stdout
    assert run.completions.read_bytes() == before


def test_a_directory_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="Not a directory"):
        _opened(tmp_path / "file" / "run")


def test_d21_samples_of_an_evaluation_are_kept_once(tmp_path: Path) -> None:
    run = _opened(tmp_path)
    for step, text in ((0, "first"), (2, "second"), (2, "again")):
        record = EvalRecord(step=step, metrics={"eval/reward": 0.5}, seconds=1.0)
        run.write_evaluation(record, [_completion(step, text)])

    def texts() -> list[str]:
        lines = (tmp_path / "eval_completions.jsonl").read_text().splitlines()
        return [json.loads(line)["completion"] for line in lines]

    assert texts() == ["first", "again"]
    # Step 2 is run again, and with it its evaluation.
    _opened(tmp_path, last_step=1)
    assert texts() == ["first"]
