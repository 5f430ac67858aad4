"""Sinks: the same records for TensorBoard, Weights & Biases and trackio, each an extra.

When a run is resumed, TensorBoard hides the steps that run again; Weights & Biases and trackio keep
both versions. ``metrics.jsonl`` holds each step once.
"""

from __future__ import annotations

import importlib
import tomllib
from collections.abc import Sequence
from typing import Any, ClassVar

from moe_replay.errors import RecipeError
from moe_replay.grpo.records import (
    BaseReporter,
    CompletionRecord,
    EvalRecord,
    RunSummary,
    StepRecord,
)
from moe_replay.report.run_directory import RunDirectory
from moe_replay.report.summary import push_speed

PROJECT = "moe-replay"
"""Project under which runs appear."""


class _Sink(BaseReporter):
    """Writes the scalars of steps and evaluations to one service."""

    package: ClassVar[str]
    """Package that it needs, which is also the extra that installs it."""

    def __init__(self, run_directory: RunDirectory, *, recipe_toml: str = "") -> None:
        try:
            self._package = importlib.import_module(self.package)
        except ImportError as error:
            raise RecipeError(
                f"logging.sinks names {self.package!r}, but the package cannot be imported ({error}); "
                f"pip install 'moe-replay[{self.package}]', or remove it from logging.sinks"
            ) from error
        self._run_directory = run_directory
        self._recipe_toml = recipe_toml
        self._run: Any = None
        """The run in the service; None before the start and after the end."""

    def step(self, record: StepRecord, completions: Sequence[CompletionRecord]) -> None:
        """Write the scalars of a step."""
        seconds = {f"seconds/{station}": value for station, value in record.seconds.items()}
        speed = push_speed([record])
        speeds = {} if speed is None else {"sync/MBps": speed}
        self._write(record.step, {**record.metrics, **seconds, **speeds})

    def evaluation(self, record: EvalRecord, completions: Sequence[CompletionRecord]) -> None:
        """Write the scalars of an evaluation."""
        self._write(record.step, dict(record.metrics))

    def close(self) -> None:
        """Write out what is pending, and end the run."""
        if self._run is not None:
            self._finish()
            self._run = None

    def _write(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars, step=step)

    def _finish(self) -> None:
        self._run.finish()


class TensorBoardReporter(_Sink):
    """Writes scalars into ``tensorboard/`` of the run directory."""

    package = "tensorboard"

    def start(self, summary: RunSummary) -> None:
        """Open the event file; events of steps that run again are hidden."""
        from torch.utils.tensorboard import SummaryWriter

        folder = self._run_directory.path / "tensorboard"
        self._run = SummaryWriter(str(folder), purge_step=summary.first_step)

    def _write(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self._run.add_scalar(name, value, global_step=step)
        self._run.flush()

    def _finish(self) -> None:
        self._run.close()


class WandbReporter(_Sink):
    """Logs to Weights & Biases; its own settings and environment choose the server and account."""

    package = "wandb"

    def start(self, summary: RunSummary) -> None:
        """Start or continue the run."""
        self._run = self._package.init(
            project=PROJECT,
            name=self._run_directory.path.name,
            dir=str(self._run_directory.path),
            id=self._run_directory.run_id,
            resume="allow",
            config=tomllib.loads(self._recipe_toml),
        )
        # Without an axis of its own, a step number below the highest one seen would be dropped.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def _write(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log({"step": step, **scalars})


class TrackioReporter(_Sink):
    """Logs to trackio, on this machine unless its environment names a Space."""

    package = "trackio"

    def start(self, summary: RunSummary) -> None:
        """Start or continue the run."""
        self._run = self._package.init(
            project=PROJECT,
            name=f"{self._run_directory.path.name}-{self._run_directory.run_id}",
            resume="allow",
            config=tomllib.loads(self._recipe_toml),
            embed=False,
        )


SINKS = {sink.package: sink for sink in (TensorBoardReporter, WandbReporter, TrackioReporter)}
"""Name in ``logging.sinks`` -> its reporter."""
