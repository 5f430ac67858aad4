"""Sinks: the same records for TensorBoard, Weights & Biases and trackio, each an extra.

When a run is resumed, TensorBoard hides the steps that run again; Weights & Biases and trackio keep
both versions. ``metrics.jsonl`` holds each step once.

In: records. Out: three reporters.
"""

from __future__ import annotations

import importlib
import tomllib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from moe_replay.errors import RecipeError
from moe_replay.grpo.records import CompletionRecord, EvalRecord, RunSummary, StepRecord
from moe_replay.report.base import BaseReporter
from moe_replay.report.run_directory import RunDirectory

PROJECT = "moe-replay"
"""Project under which runs appear."""


class TensorBoardReporter(BaseReporter):
    """Writes scalars into ``tensorboard/`` of the run directory."""

    def __init__(self, run_directory: RunDirectory) -> None:
        _require("tensorboard", "tensorboard")
        self._run_directory = run_directory
        self._writer: Any = None

    def start(self, summary: RunSummary) -> None:
        """Open the event file; events of steps that run again are hidden."""
        from torch.utils.tensorboard import SummaryWriter

        folder = self._run_directory.path / "tensorboard"
        self._writer = SummaryWriter(str(folder), purge_step=summary.first_step)

    def step(self, record: StepRecord, completions: Sequence[CompletionRecord]) -> None:
        """Write the scalars of a step."""
        self._write(record.step, _scalars(record))

    def evaluation(self, record: EvalRecord, completions: Sequence[CompletionRecord]) -> None:
        """Write the scalars of an evaluation."""
        self._write(record.step, dict(record.metrics))

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, global_step=step)
        self._writer.flush()


class WandbReporter(BaseReporter):
    """Logs to Weights & Biases; its own settings and environment choose the server and account."""

    def __init__(self, run_directory: RunDirectory, *, recipe_toml: str) -> None:
        self._wandb = _require("wandb", "wandb")
        self._run_directory = run_directory
        self._recipe_toml = recipe_toml
        self._run: Any = None

    def start(self, summary: RunSummary) -> None:
        """Start or continue the run."""
        self._run = self._wandb.init(
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

    def step(self, record: StepRecord, completions: Sequence[CompletionRecord]) -> None:
        """Log the scalars of a step."""
        self._run.log({"step": record.step, **_scalars(record)})

    def evaluation(self, record: EvalRecord, completions: Sequence[CompletionRecord]) -> None:
        """Log the scalars of an evaluation."""
        self._run.log({"step": record.step, **record.metrics})

    def close(self) -> None:
        """Finish the upload."""
        if self._run is not None:
            self._run.finish()
            self._run = None


class TrackioReporter(BaseReporter):
    """Logs to trackio, on this machine unless its environment names a Space."""

    def __init__(self, run_directory: RunDirectory, *, recipe_toml: str) -> None:
        self._trackio = _require("trackio", "trackio")
        self._run_directory = run_directory
        self._recipe_toml = recipe_toml
        self._run: Any = None

    def start(self, summary: RunSummary) -> None:
        """Start or continue the run."""
        path = self._run_directory.path
        self._run = self._trackio.init(
            project=PROJECT,
            name=f"{path.name}-{self._run_directory.run_id}",
            resume="allow",
            config=tomllib.loads(self._recipe_toml),
            embed=False,
        )

    def step(self, record: StepRecord, completions: Sequence[CompletionRecord]) -> None:
        """Log the scalars of a step."""
        self._run.log(_scalars(record), step=record.step)

    def evaluation(self, record: EvalRecord, completions: Sequence[CompletionRecord]) -> None:
        """Log the scalars of an evaluation."""
        self._run.log(dict(record.metrics), step=record.step)

    def close(self) -> None:
        """Write out what is pending."""
        if self._run is not None:
            self._run.finish()
            self._run = None


def _scalars(record: StepRecord) -> dict[str, float]:
    seconds = {f"seconds/{station}": value for station, value in record.seconds.items()}
    return {**record.metrics, **seconds}


def _require(module: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RecipeError(
            f"logging.sinks names {extra!r}, but the package cannot be imported ({error}); "
            f"pip install 'moe-replay[{extra}]', or remove it from logging.sinks"
        ) from error
