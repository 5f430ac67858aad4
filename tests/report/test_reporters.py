"""Who is told what, and what happens when one of them fails."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from moe_replay.errors import RecipeError
from moe_replay.grpo.records import CompletionRecord, EvalRecord, RunSummary, StepRecord
from moe_replay.recipe.load import recipe_from_table
from moe_replay.recipe.recipe import Recipe
from moe_replay.report import (
    BaseReporter,
    CompositeReporter,
    JsonlReporter,
    RunDirectory,
    SilentReporter,
    build_reporter,
)
from moe_replay.report.sinks import TensorBoardReporter, TrackioReporter, WandbReporter

RECIPE = '[run]\noutput_dir = "runs/a"\nmax_steps = 5\n'


def _recipe(tmp_path: Path, sinks: tuple[str, ...] = ()) -> Recipe:
    return recipe_from_table(
        {
            "run": {"output_dir": str(tmp_path), "max_steps": 5},
            "model": {"path": str(tmp_path)},
            "data": {"train": "reasoning_gym:chain_sum"},
            "rewards": [{"function": "reasoning_gym"}],
            "rollout": {"max_completion_length": 8, "num_generations": 2, "max_batch_size": 4},
            "batch": {"global_batch_size": 4, "micro_batch_size": 1},
            "logging": {"sinks": list(sinks)},
        }
    )


def _run(reporter: BaseReporter, first_step: int, last_step: int) -> None:
    with reporter:
        reporter.start(RunSummary(sections={}, first_step=first_step, max_steps=5))
        if first_step == 1:
            reporter.evaluation(EvalRecord(step=0, metrics={"eval/reward": 0.5}, seconds=1.0), [])
        for step in range(first_step, last_step + 1):
            reporter.station(step, "rollout")
            record = StepRecord(step=step, metrics={"reward": step / 2}, seconds={"rollout": 1.0})
            reporter.step(record, [])
        reporter.finish("done")


def test_rank_0_writes_files_and_the_others_are_silent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(build_reporter(_recipe(tmp_path), rank=1, run_directory=RunDirectory(tmp_path)), 1, 2)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""
    _run(build_reporter(_recipe(tmp_path), rank=0, run_directory=RunDirectory(tmp_path)), 1, 2)
    assert [record.step for record in RunDirectory(tmp_path).read_steps()] == [1, 2]
    assert "2/5" in capsys.readouterr().out


def test_a_rank_that_does_not_speak_needs_no_sinks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    reporter = build_reporter(
        _recipe(tmp_path, ("wandb",)), rank=3, run_directory=RunDirectory(tmp_path)
    )
    assert isinstance(reporter, SilentReporter)


@pytest.mark.parametrize("sink", ["tensorboard", "wandb", "trackio"])
def test_a_sink_without_its_package_is_refused_at_start(
    sink: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # None makes the import fail, as it does where the package is not installed.
    monkeypatch.setitem(sys.modules, sink, None)
    with pytest.raises(RecipeError, match=rf"pip install 'moe-replay\[{sink}\]'"):
        build_reporter(_recipe(tmp_path, (sink,)), rank=0, run_directory=RunDirectory(tmp_path))


def test_the_recipe_is_in_the_run_directory(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    _run(build_reporter(recipe, rank=0, run_directory=RunDirectory(tmp_path)), 1, 1)
    assert (tmp_path / "recipe.toml").read_text() == recipe.resolved_toml()


def test_resuming_continues_after_the_last_checkpoint(tmp_path: Path) -> None:
    _run(JsonlReporter(RunDirectory(tmp_path), recipe_toml=RECIPE), 1, 4)
    _run(JsonlReporter(RunDirectory(tmp_path), recipe_toml=RECIPE), 3, 5)
    assert [record.step for record in RunDirectory(tmp_path).read_steps()] == [1, 2, 3, 4, 5]


class _Unreachable(BaseReporter):
    def step(self, record: StepRecord, completions: Sequence[CompletionRecord]) -> None:
        raise OSError("the service is gone")


class _Unclosable(BaseReporter):
    close_was_called = False

    def close(self) -> None:
        self.close_was_called = True
        raise OSError("the service is gone")


def test_a_reporter_that_fails_stops_the_run_after_the_files_were_written(tmp_path: Path) -> None:
    files = JsonlReporter(RunDirectory(tmp_path), recipe_toml=RECIPE)
    with pytest.raises(OSError, match="the service is gone"):
        _run(CompositeReporter([files, _Unreachable()]), 1, 3)
    assert [record.step for record in RunDirectory(tmp_path).read_steps()] == [1]


def test_all_reporters_are_closed_even_if_one_cannot_be() -> None:
    first, second = _Unclosable(), _Unclosable()
    with pytest.raises(OSError, match="the service is gone"):
        CompositeReporter([first, second]).close()
    assert first.close_was_called
    assert second.close_was_called


def test_tensorboard_shows_every_step_once_after_resuming(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = RunDirectory(tmp_path)
    _run(_with_files(run, TensorBoardReporter(run)), 1, 3)
    _run(_with_files(run, TensorBoardReporter(run)), 2, 5)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [
        (1, 0.5),
        (2, 1.0),
        (3, 1.5),
        (4, 2.0),
        (5, 2.5),
    ]
    assert set(events.Tags()["scalars"]) == {"eval/reward", "reward", "seconds/rollout"}


@pytest.mark.slow
def test_wandb_keeps_one_run_when_it_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "WANDB_MODE", "offline")
    monkeypatch.setitem(os.environ, "WANDB_SILENT", "true")
    pytest.importorskip("wandb")
    run = RunDirectory(tmp_path)
    _run(_with_files(run, WandbReporter(run, recipe_toml=RECIPE)), 1, 3)
    _run(_with_files(run, WandbReporter(run, recipe_toml=RECIPE)), 2, 5)
    names = {path.name.rsplit("-", 1)[1] for path in (tmp_path / "wandb").glob("offline-run-*")}
    assert names == {(tmp_path / "run_id").read_text()}


@pytest.mark.slow
def test_trackio_keeps_one_run_when_it_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    run = RunDirectory(tmp_path / "run")
    _run(_with_files(run, TrackioReporter(run, recipe_toml=RECIPE)), 1, 3)
    _run(_with_files(run, TrackioReporter(run, recipe_toml=RECIPE)), 4, 5)
    assert SQLiteStorage.get_projects() == ["moe-replay"]
    name = f"run-{(run.path / 'run_id').read_text()}"
    logs = SQLiteStorage.get_logs("moe-replay", name)
    assert [line["reward"] for line in logs if "reward" in line] == [0.5, 1.0, 1.5, 2.0, 2.5]


def _with_files(run: RunDirectory, sink: BaseReporter) -> CompositeReporter:
    return CompositeReporter([JsonlReporter(run, recipe_toml=RECIPE), sink])
