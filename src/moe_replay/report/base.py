"""The common ground of all reporters: a lifetime, and methods that do nothing.

In: records. Out: BaseReporter, SilentReporter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType

from moe_replay.engines.types import RolloutProgress
from moe_replay.grpo.records import CompletionRecord, EvalRecord, RunSummary, StepRecord


class BaseReporter:
    """A `Reporter` whose methods do nothing, to be overridden; as a context manager it closes itself.

    A reporter that fails raises, and the run stops: a run that is not recorded is a run that cannot be trusted, and
    it resumes from its last checkpoint.
    """

    def start(self, summary: RunSummary) -> None:
        """Announce the run."""

    def follow(self, progress: Callable[[], RolloutProgress], *, whose: str) -> None:
        """Ask ``progress`` while completions are sampled."""

    def station(self, step: int, name: str) -> None:
        """Say that ``step`` has entered a station of the flow."""

    def step(self, record: StepRecord, completions: Sequence[CompletionRecord]) -> None:
        """Take a finished step."""

    def evaluation(self, record: EvalRecord, completions: Sequence[CompletionRecord]) -> None:
        """Take an evaluation."""

    def finish(self, message: str) -> None:
        """Show the summary and ``message``: the run has reached its last step."""

    def close(self) -> None:
        """Give the terminal and files back, after an error too; calling it twice is allowed."""

    def __enter__(self) -> BaseReporter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class SilentReporter(BaseReporter):
    """Reports nothing: for the ranks that do not speak."""
