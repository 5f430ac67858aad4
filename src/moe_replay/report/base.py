"""The base of all reporters: a lifetime, and methods that do nothing.

In: records. Out: BaseReporter, SilentReporter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moe_replay.engines.types import RolloutProgress
from moe_replay.grpo.records import CompletionRecord, EvalRecord, RunSummary, StepRecord


class BaseReporter:
    """A `Reporter` and context manager whose methods do nothing, to be overridden.

    A failing reporter raises and stops the run, which resumes from its last checkpoint: a run that
    is not recorded cannot be trusted.
    """

    def start(self, summary: RunSummary) -> None:
        """Announce the run."""

    def follow(self, progress: Callable[[], RolloutProgress], *, whose: str) -> None:
        """Poll ``progress`` while completions are sampled."""

    def station(self, step: int, name: str) -> None:
        """Say that ``step`` has entered a station of the flow."""

    def step(self, record: StepRecord, completions: Sequence[CompletionRecord]) -> None:
        """Report a finished step."""

    def evaluation(self, record: EvalRecord, completions: Sequence[CompletionRecord]) -> None:
        """Report an evaluation."""

    def finish(self, message: str) -> None:
        """Show the summary and ``message`` after the last step."""

    def close(self) -> None:
        """Release the terminal and files, also after an error; may be called twice."""

    def __enter__(self) -> BaseReporter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SilentReporter(BaseReporter):
    """Reports nothing: for ranks other than 0."""
