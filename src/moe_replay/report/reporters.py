"""Which reporters a recipe asks for: files first, then the terminal, then the sinks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from moe_replay.grpo.records import (
    BaseReporter,
    CompletionRecord,
    EvalRecord,
    RunSummary,
    StepRecord,
)
from moe_replay.recipe.recipe import Recipe
from moe_replay.report.display import ConsoleReporter
from moe_replay.report.run_directory import RunDirectory
from moe_replay.report.sinks import SINKS


class SilentReporter(BaseReporter):
    """Reports nothing: for ranks other than 0."""


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


def _told_to_all(method: str) -> Callable[..., None]:
    def call(self: CompositeReporter, *args: object, **options: object) -> None:
        for reporter in self.reporters:
            getattr(reporter, method)(*args, **options)

    return call


class CompositeReporter(BaseReporter):
    """Calls several reporters in order; the first failure ends the run, and all are closed."""

    def __init__(self, reporters: Sequence[BaseReporter]) -> None:
        self.reporters = tuple(reporters)
        """Those that are called."""

    start = _told_to_all("start")
    follow = _told_to_all("follow")
    station = _told_to_all("station")
    step = _told_to_all("step")
    evaluation = _told_to_all("evaluation")
    finish = _told_to_all("finish")

    def close(self) -> None:
        """Close every reporter, even if closing one fails."""
        with ExitStack() as stack:
            for reporter in self.reporters:
                stack.callback(reporter.close)


def build_reporter(recipe: Recipe, *, rank: int, run_directory: RunDirectory) -> BaseReporter:
    """Return the reporters of a recipe as a context manager; ranks other than 0 get a silent one.

    Raises:
        RecipeError: the package of a sink is missing.
    """
    if rank != 0:
        return SilentReporter()
    recipe_toml = recipe.resolved_toml()
    sinks = [SINKS[name](run_directory, recipe_toml=recipe_toml) for name in recipe.logging.sinks]
    files = JsonlReporter(run_directory, recipe_toml=recipe_toml)
    return CompositeReporter([files, ConsoleReporter(run_directory=run_directory), *sinks])
