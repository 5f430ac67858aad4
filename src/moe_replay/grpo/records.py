"""The records of a run, and the seam through which they are shown and stored."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_replay.engines.types import RolloutProgress


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """What is about to run, in words for a person."""

    sections: Mapping[str, Sequence[str]]
    """Heading (`Model`, `Layout`, `Engine`, `Replay`...) -> lines, in the order they are shown."""
    first_step: int
    """First step of this process; above 1 when a run resumes."""
    max_steps: int
    """Last step."""


END_FILE = "ended.json"
"""File of the run directory with the `RunEnd` of a run that ended by itself."""
FAILURE_FILE = "failed.json"
"""File of the run directory with the `RunFailure` of a run that an error ended."""
EXPORT_FOLDER = "export"
"""Folder of the run directory with the trained model as a Hugging Face checkpoint."""
NEW_EXPORT = "export.new"
"""Folder of an export being written; a killed writer leaves it, or it with ``.partial``."""


def report_command(directory: Path) -> str:
    """Return the command that makes a page of a run directory."""
    return f"moe-replay report {shlex.quote(str(directory))}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnd:
    """How a call of `train` ended."""

    step: int
    """Finished steps, all saved; a run that goes on starts after them."""
    max_steps: int
    """Steps of the run from start to end."""
    stopped_by: str | None
    """What asked the run to stop early, such as ``SIGTERM``; None for a run that is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFailure:
    """The error that ended a call of `train`."""

    step: int
    """Step in flight, 0 before the first one."""
    max_steps: int
    """Steps of the run from start to end."""
    kind: str
    """Class of the error, such as ``MisalignmentError``."""
    message: str
    """What it says, with credentials masked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRecord:
    """The sampled tokens of a completion one by one; those of an environment are not among them."""

    texts: Sequence[str]
    """What each token alone decodes to; a part of a character is a replacement character."""
    rollout_logprobs: Sequence[float]
    """Log-probability by the engine, in nats, to 5 decimals."""
    old_logprobs: Sequence[float]
    """The same by the trainer, before the update."""
    flips: Sequence[int | None] | None
    """Layers whose live expert set differed from the replayed one in the row that predicted the
    token, None where that row was live; None as a whole where the engine's routes are not
    replayed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRecord:
    """A completion and what it earned: a line of ``[eval_]completions.jsonl``."""

    step: int
    """Step that sampled it, from 1; of an evaluation, the steps before it."""
    item: int
    """Index of the dataset's item, from 0."""
    prompt: str
    """Prompt text as decoded from its ids."""
    columns: Mapping[str, Any]
    """Column of the dataset -> value, of those that a reward function reads and JSON can hold."""
    completion: str
    """Completion text."""
    rewards: Mapping[str, float | None]
    """Reward function -> its score, before weights; None where it has no opinion."""
    reward: float | None
    """Weighted sum; None where no function has an opinion."""
    advantage: float | None
    """What the update used; None in an evaluation."""
    num_tokens: int
    """Sampled tokens."""
    finish_reason: str
    """Value of `FinishReason`."""
    policy_version: int
    """Weight pushes that the engine had received."""
    server: str = ""
    """Address of the server that sampled it; empty for an engine in a trainer's process."""
    dataset: str = ""
    """Its dataset in ``[[mixture]]``; empty without one."""
    held_out: str = ""
    """Name of its held-out set; empty for ``data.eval``, and in training."""
    dropped: str | None = None
    """Why the guard kept it out of training: ``misaligned`` (its routes were not its own) or
    ``lost`` (drift has left too little of them); usually None."""
    sample: int | None = None
    """Index among the samples of the step, or of the evaluation's set, from 0; None in records of
    releases that did not keep it."""
    agreement: float | None = None
    """Share of its expert slots on which live and replayed routes agree, with R3 in training."""
    tokens: TokenRecord | None = None
    """Its tokens, for ``logging.num_with_tokens`` completions of a step."""
    turns: Sequence[Mapping[str, Any]] | None = None
    """What policy and environment said in turn: ``by``, ``text``, ``num_tokens``; None without an
    environment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One finished step: a line of ``metrics.jsonl``."""

    step: int
    """From 1."""
    metrics: Mapping[str, float]
    """Metric (``reward``, ``rollout_correction/k3_kl``...) -> value; deterministic."""
    seconds: Mapping[str, float]
    """Station (``rollout``, ``reward``, ``update``, ``sync``...) -> wall seconds."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What belongs to a metric and is not a number, under its name: the sample behind
    ``replay/agreement_min_sample``, for one. Plain values, in ``metrics.jsonl`` only."""
    warnings: tuple[str, ...] = ()
    """What a person should know although the run goes on, such as a router that collapsed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRecord:
    """Held-out accuracy after ``step`` steps."""

    step: int
    """0 before training."""
    metrics: Mapping[str, float]
    """``eval/reward``, ``eval/rewards/<function>``, ``eval/<set>/pass@1``..."""
    seconds: float
    """Wall seconds of the evaluation."""


class BaseReporter:
    """What the loop tells a person and the files: methods that do nothing, to be overridden.

    Every method returns quickly and never changes the run; `with` closes it. A failing reporter
    raises and stops the run, which resumes from its last checkpoint: a run that is not recorded
    cannot be trusted.
    """

    def start(self, summary: RunSummary) -> None:
        """Announce the run."""

    def follow(self, progress: Callable[[], RolloutProgress], *, whose: str) -> None:
        """Ask ``progress`` during sampling; ``whose`` names the ranks it covers, ``""`` for all."""

    def station(self, step: int, name: str) -> None:
        """Say that ``step`` has entered a station of the flow (``rollout``, ``update``...)."""

    def step(self, record: StepRecord, completions: Sequence[CompletionRecord]) -> None:
        """Take a finished step and, on rank 0 only, the completions that are kept of it."""

    def evaluation(self, record: EvalRecord, completions: Sequence[CompletionRecord]) -> None:
        """Take an evaluation and, on rank 0 only, the completions that are kept of it."""

    def finish(self, message: str) -> None:
        """Show the summary and ``message`` after the last step."""

    def close(self) -> None:
        """Release the terminal and files, also after an error; may be called twice."""

    def __enter__(self) -> BaseReporter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
