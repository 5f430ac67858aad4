"""Requests to stop, at every moment of a run: what is kept and dropped, alike on all ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_replay
from moe_replay.engines.types import Engine, Request, RolloutGroup, SamplingParams
from moe_replay.grpo.engines import recipe_engine
from moe_replay.grpo.loop import train
from moe_replay.grpo.records import RunEnd
from moe_replay.grpo.stopping import StopRequest, StopRequested
from moe_replay.recipe.recipe import ProcessSpec, Recipe
from moe_replay.recipe.sections.run import seconds_of
from moe_replay.report import RunDirectory, build_reporter
from moe_replay.testing.ranks import run_ranks

from .smallest_recipe import problems_of
from .smallest_recipe import recipe as smallest
from .test_loop import metrics_of, run

SOURCES = Path(moe_replay.__file__).parents[1]
Recipes = Callable[..., Recipe]


class StoppingEngine:
    """The recipe's engine; one of its calls asks the run to stop, and may then never return."""

    def __init__(self, inner: Engine, case: str, stop: StopRequest) -> None:
        self.inner, self.case, self.stop = inner, case, stop
        self.num_rollouts = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[RolloutGroup]:
        """Sample, or ask to stop in the second rollout or the evaluation after the first."""
        is_evaluation = sampling.temperature == 0
        self.num_rollouts += not is_evaluation
        speaks = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        if speaks and self.num_rollouts == 2 - is_evaluation:
            if self.case == ("evaluation" if is_evaluation else "rollout"):
                os.kill(os.getpid(), signal.SIGTERM)
                threading.Event().wait()
            if self.case == "time" and not is_evaluation:
                self.stop.ask_after(0.0, "run.max_time = 3h50m")
                threading.Event().wait()
        return self.inner.generate(requests, sampling)

    def load_weights(self, weights: object, *, policy_version: int) -> None:
        """Take the weights; ask to stop after the update of the second step."""
        self.inner.load_weights(weights, policy_version=policy_version)  # pyrefly: ignore
        if self.case == "update" and policy_version == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def stopped(recipe: Recipe, case: str, world_size: int = 1) -> RunEnd:
    """Train until the case's request; return what every rank returns."""

    def call() -> RunEnd:
        rank = torch.distributed.get_rank()
        process = ProcessSpec(rank=rank, world_size=world_size)
        directory = RunDirectory(recipe.run.output_dir)
        stop = StopRequest()
        with (
            stop.listening(forwards=False, say=print),
            build_reporter(recipe, rank=rank, run_directory=directory) as reporter,
        ):
            return train(
                recipe,
                process=process,
                reporter=reporter,
                make_engine=lambda r, device: StoppingEngine(recipe_engine(r, device), case, stop),
                stop=stop,
            )

    ends = run_ranks(call, world_size)
    assert len(set(ends)) == 1
    return ends[0]


def settings_of(workspace: Path) -> dict[str, Any]:
    # Saved by nothing but the request; evaluated after every step.
    return {
        "run__max_steps": 3,
        "checkpoint__save_steps": 10,
        "checkpoint__export": "false",
        "data__eval": workspace / "train.jsonl",
        "data__eval_size": 4,
        "eval__every_steps": 1,
    }


@pytest.fixture(scope="session")
def whole(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Return world size -> directory of an uninterrupted run, made once for each."""
    from moe_replay.recipe.load import load_recipe

    made: dict[int, Path] = {}

    def of(world_size: int) -> Path:
        if world_size not in made:
            made[world_size] = tmp_path_factory.mktemp("whole")
            options = {**settings_of(workspace), "run__output_dir": made[world_size]}
            pairs = [(key.replace("__", "."), str(value)) for key, value in options.items()]
            run(load_recipe(workspace / "recipe.toml", pairs), world_size=world_size)
        return made[world_size]

    return of


def lines_of(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("case", "world_size", "finished"),
    [
        ("rollout", 1, 1),
        ("rollout", 2, 1),
        ("time", 2, 1),
        ("evaluation", 2, 1),
        ("update", 1, 2),
    ],
)
def test_r8_a_stopped_run_is_saved_and_goes_on_as_if_nothing_had_been(
    case: str,
    world_size: int,
    finished: int,
    recipe: Recipes,
    workspace: Path,
    whole: Callable[[int], Path],
) -> None:
    part = recipe(**settings_of(workspace))
    reason = "run.max_time = 3h50m" if case == "time" else "SIGTERM"
    expected = RunEnd(step=finished, max_steps=3, stopped_by=reason)
    assert stopped(part, case, world_size) == expected
    output = part.run.output_dir
    saved = [path.name for path in (output / "checkpoints").iterdir()]
    assert saved == [f"step-{finished:06d}"]
    assert json.loads((output / "ended.json").read_text())["stopped_by"] == reason
    assert [record["step"] for record in metrics_of(part)] == list(range(1, finished + 1))
    # Starting again with what asked it to stop still there must not lose anything either.
    run(part, world_size=world_size)
    for name in ("metrics.jsonl", "completions.jsonl", "eval.jsonl"):
        assert lines_of(output, name) == lines_of(whole(world_size), name)
    assert json.loads((output / "ended.json").read_text())["stopped_by"] is None


@pytest.mark.ranks
def test_r8_a_run_that_was_stopped_before_its_first_step_has_no_checkpoint(
    recipe: Recipes,
) -> None:
    unstarted = recipe(run__max_steps=1)

    def call(asks: bool) -> object:
        stop = StopRequest()
        if asks:
            stop.ask("SIGHUP")
        directory = RunDirectory(unstarted.run.output_dir)
        with build_reporter(unstarted, rank=0, run_directory=directory) as reporter:
            try:
                return train(unstarted, process=ProcessSpec(), reporter=reporter, stop=stop)
            except StopRequested:
                return "not begun"

    assert run_ranks(call, 1, True) == ["not begun"]
    assert not list(unstarted.run.output_dir.glob("checkpoints/*"))
    assert run_ranks(call, 1, False) == [RunEnd(step=1, max_steps=1, stopped_by=None)]
    # A run that is done stays done.
    assert run_ranks(call, 1, False) == [RunEnd(step=1, max_steps=1, stopped_by=None)]


BUSY = """
import hashlib, sys
from moe_replay.grpo.stopping import StopRequest
stop = StopRequest()
with stop.listening(forwards=False, say=lambda text: print(text, flush=True)):
    print("ready", flush=True)
    # Minutes in C, where no handler of Python runs.
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_r8_a_second_signal_ends_the_process_at_once(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", BUSY],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
    ) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(number)
            assert process.stdout.readline().startswith(f"{number.name}: stopping")
            process.send_signal(number)
            assert process.wait() == 128 + number
            assert "ended at once" in process.stderr.read()
        finally:
            process.kill()


FORKING = """
import os, signal, sys
from moe_replay.grpo.stopping import StopRequest
stop = StopRequest()
before = signal.getsignal(signal.SIGINT)
with stop.listening(forwards=False, say=lambda text: print(text, flush=True)):
    child = os.fork()
    if child == 0:
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGTERM)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
    assert stop.reason is None
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.reason == "SIGTERM"
assert signal.getsignal(signal.SIGINT) is before
"""


def test_r8_signals_of_a_forked_process_are_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKING],
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_r8_durations_are_read_in_days_hours_minutes_and_seconds() -> None:
    assert seconds_of("3h50m") == 13800
    assert seconds_of("1d2h3m4s") == 93784
    assert seconds_of("90s") == 90
    assert smallest(run={"max_time": 90}).run.max_seconds == 90
    assert smallest(run={"max_time": "1h"}).run.max_seconds == 3600
    assert smallest(run={"max_time": "1h"}).fingerprint_items() == smallest().fingerprint_items()
    for wrong in ("", "3", "50m3h", "0h", "3 h", "-1h"):
        assert "run.max_time" in problems_of(run={"max_time": wrong})
    assert "run.max_time" in problems_of(run={"max_time": 0})
