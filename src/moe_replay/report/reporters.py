"""Which reporters a recipe asks for: files first, then the terminal, then the sinks.

In: the recipe. Out: a reporter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from moe_replay.engines.types import RolloutProgress
from moe_replay.grpo.records import CompletionRecord, EvalRecord, RunSummary, StepRecord
from moe_replay.recipe.recipe import Recipe
from moe_replay.report.base import BaseReporter, SilentReporter
from moe_replay.report.display import ConsoleReporter
from moe_replay.report.run_directory import RunDirectory
from moe_replay.report.sinks import TensorBoardReporter, TrackioReporter, WandbReporter


class JsonlReporter(BaseReporter):
    """Writes the run directory; a step is on disk when `step` returns."""

    def __init__(self, run_directory: RunDirectory, *, recipe_toml: str) -> None:
        self._run_directory = run_directory
        self._recipe_toml = recipe_toml

    def start(self, summary: RunSummary) -> None:
        """Create the directory, and drop records of steps that run again."""
        self._run_directory.open(recipe_toml=self._recipe_toml, last_step=summary.first_step - 1)

    def step(self, record: StepRecord, completions: Sequence[CompletionRecord]) -> None:
        """Append a step and its completions."""
        self._run_directory.write_step(record, completions)

    def evaluation(self, record: EvalRecord, completions: Sequence[CompletionRecord]) -> None:
        """Append an evaluation and its completions."""
        self._run_directory.write_evaluation(record, completions)


class CompositeReporter(BaseReporter):
    """Calls several reporters in order; the first failure ends the run, and all are closed."""

    def __init__(self, reporters: Sequence[BaseReporter]) -> None:
        self._reporters = tuple(reporters)

    def start(self, summary: RunSummary) -> None:
        """Announce the run."""
        for reporter in self._reporters:
            reporter.start(summary)

    def follow(self, progress: Callable[[], RolloutProgress], *, whose: str) -> None:
        """Poll ``progress`` while completions are sampled."""
        for reporter in self._reporters:
            reporter.follow(progress, whose=whose)

    def station(self, step: int, name: str) -> None:
        """Say that ``step`` has entered a station of the flow."""
        for reporter in self._reporters:
            reporter.station(step, name)

    def step(self, record: StepRecord, completions: Sequence[CompletionRecord]) -> None:
        """Report a finished step."""
        for reporter in self._reporters:
            reporter.step(record, completions)

    def evaluation(self, record: EvalRecord, completions: Sequence[CompletionRecord]) -> None:
        """Report an evaluation."""
        for reporter in self._reporters:
            reporter.evaluation(record, completions)

    def finish(self, message: str) -> None:
        """Show the summary and ``message``."""
        for reporter in self._reporters:
            reporter.finish(message)

    def close(self) -> None:
        """Close every reporter, even if closing one fails."""
        with ExitStack() as stack:
            for reporter in self._reporters:
                stack.callback(reporter.close)


def build_reporter(recipe: Recipe, *, rank: int, run_directory: RunDirectory) -> BaseReporter:
    """Return the reporters of a recipe as a context manager; ranks other than 0 get a silent one.

    Raises:
        RecipeError: the package of a sink is missing.
    """
    if rank != 0:
        return SilentReporter()
    recipe_toml = recipe.resolved_toml()
    sinks: list[BaseReporter] = []
    for name in recipe.logging.sinks:
        if name == "tensorboard":
            sinks.append(TensorBoardReporter(run_directory))
        elif name == "wandb":
            sinks.append(WandbReporter(run_directory, recipe_toml=recipe_toml))
        else:
            sinks.append(TrackioReporter(run_directory, recipe_toml=recipe_toml))
    files = JsonlReporter(run_directory, recipe_toml=recipe_toml)
    return CompositeReporter([files, ConsoleReporter(run_directory=run_directory), *sinks])
