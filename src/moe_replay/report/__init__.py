"""What a person sees of a run, and the files that a run leaves behind."""

from moe_replay.grpo.records import BaseReporter
from moe_replay.report.display import ConsoleReporter
from moe_replay.report.reporters import (
    CompositeReporter,
    JsonlReporter,
    SilentReporter,
    build_reporter,
)
from moe_replay.report.run_directory import RunDirectory

__all__ = [
    "BaseReporter",
    "CompositeReporter",
    "ConsoleReporter",
    "JsonlReporter",
    "RunDirectory",
    "SilentReporter",
    "build_reporter",
]
