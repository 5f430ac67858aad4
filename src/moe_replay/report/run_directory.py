"""The run directory: everything that a run leaves behind, with each step exactly once.

::

    <output_dir>/
    ├── recipe.toml         the recipe with every default filled in
    ├── versions.json       the software that ran it
    ├── run.lock            held by the process that writes here, see `RunLock`
    ├── changes.jsonl       differences from the checkpoint that were accepted with --allow-changed
    ├── digests.json        digests of large input files, so they are read once
    ├── ended.json          how the last run ended; missing while it runs, or after a kill
    ├── failed.json         the error that ended the last run; missing otherwise
    ├── run_id              name of the run in logging services; a run from the start gets a new one
    ├── metrics.jsonl       one line a step: {"step": 1, "reward": 0.5, ..., "seconds": {...}}
    ├── completions.jsonl   one line a completion, see `CompletionRecord`
    ├── eval.jsonl          one line an evaluation
    ├── eval_completions.jsonl  one line a completion of an evaluation
    ├── checkpoints/        what a run resumes from
    └── export/             the trained model as a Hugging Face checkpoint
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import platform
import secrets
import shutil
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from moe_replay.errors import CheckpointError, MoeReplayError
from moe_replay.grpo.records import CompletionRecord, EvalRecord, StepRecord, TokenRecord
from moe_replay.grpo.start.packages import installed
from moe_replay.routing.format.whole_file import whole_file

PACKAGES = (
    "moe-replay",
    "torch",
    "megatron-core",
    "transformers",
    "safetensors",
    "numpy",
    "reasoning-gym",
    "math-verify",
    "vllm",
    "sglang",
)
"""Packages whose versions are recorded; a missing one is null."""

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class RunDirectory:
    """Writes and reads the files of one run; only one process may write.

    `open` is the first to write anything, so a finished run can be read without changing it.
    """

    def __init__(self, path: Path | str) -> None:
        path = Path(path).absolute()
        self.path = path
        """The directory itself."""
        self.metrics = path / "metrics.jsonl"
        """One line a step."""
        self.completions = path / "completions.jsonl"
        """One line a completion."""
        self.evaluations = path / "eval.jsonl"
        """One line an evaluation."""
        self.eval_completions = path / "eval_completions.jsonl"
        """One line a completion of an evaluation."""
        self.checkpoints = path / "checkpoints"
        """What a run resumes from."""
        self.export = path / "export"
        """The trained model."""
        self.missing_steps: tuple[int, ...] = ()
        """Steps before the resumed one without a line in ``metrics.jsonl``; normally empty."""

    def __repr__(self) -> str:
        return f"RunDirectory({str(self.path)!r})"

    def open(self, *, recipe_toml: str, last_step: int) -> None:
        """Create the directory, or resume it after ``last_step`` (0: from the start).

        Records of later steps are removed, because those steps run again. A recipe or version file
        that differs from the current one is kept as ``<name>.until-step-<last_step>``.

        Raises:
            CheckpointError: a record cannot be read, or the directory cannot be written.
        """
        self._lay_out(recipe_toml, last_step=last_step)
        for file in (self.metrics, self.completions, self.evaluations, self.eval_completions):
            _keep_lines(file, lambda line: line["step"] <= last_step)
        recorded = {record.step for record in self.read_steps()}
        self.missing_steps = tuple(sorted(set(range(1, last_step + 1)) - recorded))

    @property
    def run_id(self) -> str:
        """Name of this run in logging services; unchanged by resuming."""
        return (self.path / "run_id").read_text()

    def write_step(self, record: StepRecord, completions: Sequence[CompletionRecord]) -> None:
        """Append a finished step and sync it to disk, the line in ``metrics.jsonl`` last.

        Raises:
            CheckpointError: the disk is full or cannot be written; the files are then unchanged.
            MoeReplayError: a metric is not finite.
        """
        _append(self.completions, [asdict(completion) for completion in completions])
        line = {"step": record.step, **_sorted(record.metrics), "seconds": dict(record.seconds)}
        if record.details:
            line["details"] = dict(record.details)
        _append(self.metrics, [line])

    def write_evaluation(
        self, record: EvalRecord, completions: Sequence[CompletionRecord] = ()
    ) -> None:
        """Append an evaluation and its completions, or replace those of the same step.

        Raises:
            CheckpointError: the disk is full or cannot be written.
        """
        if any(known.step == record.step for known in self.read_evaluations()):
            for file in (self.evaluations, self.eval_completions):
                _keep_lines(file, lambda line: line["step"] != record.step)
        _append(self.eval_completions, [asdict(completion) for completion in completions])
        line = {"step": record.step, **_sorted(record.metrics), "seconds": record.seconds}
        _append(self.evaluations, [line])

    def read_steps(self) -> list[StepRecord]:
        """Return the recorded steps, in order."""
        return [
            StepRecord(
                step=line.pop("step"),
                seconds=line.pop("seconds"),
                details=line.pop("details", {}),
                metrics=line,
            )
            for _, line in _lines(self.metrics)
        ]

    def read_evaluations(self) -> list[EvalRecord]:
        """Return the recorded evaluations, in order."""
        return [
            EvalRecord(step=line.pop("step"), seconds=line.pop("seconds"), metrics=line)
            for _, line in _lines(self.evaluations)
        ]

    def read_completions(self, steps: Collection[int]) -> Iterator[CompletionRecord]:
        """Yield the recorded training completions of some steps, in order.

        Lines of other steps are passed over without being parsed: the file of a long run is large.
        """
        wanted = {b'{"step": %d,' % step for step in steps}
        for _, line in _lines(self.completions, wanted=wanted):
            known = {name: line[name] for name in _COMPLETION_FIELDS if name in line}
            if tokens := known.get("tokens"):
                known["tokens"] = TokenRecord(**tokens)
            yield CompletionRecord(**known)

    def _lay_out(self, recipe_toml: str, *, last_step: int) -> None:
        versions = json.dumps(software_versions(), indent=2) + "\n"
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.export.mkdir(exist_ok=True)
            for name, text in (("recipe.toml", recipe_toml), ("versions.json", versions)):
                file = self.path / name
                earlier = file.with_name(f"{name}.until-step-{last_step}")
                if file.exists() and file.read_bytes() != text.encode() and not earlier.exists():
                    file.replace(earlier)
                _replace(file, [text.encode()])
            if last_step == 0 or not (self.path / "run_id").exists():
                _replace(self.path / "run_id", [secrets.token_hex(4).encode()])
        except OSError as error:
            raise _write_error(self.path, error) from error


def software_versions() -> dict[str, str | None]:
    """Return package, Python and platform versions."""
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "executable": sys.executable,
    }
    return versions | {package: installed(package) for package in PACKAGES}


def _sorted(metrics: Mapping[str, float]) -> dict[str, float]:
    clash = {"step", "seconds", "details"} & metrics.keys()
    assert not clash, f"metrics must not be called {clash}"
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise MoeReplayError(
                f"metric {name} is {value}, expected a finite number; training has probably diverged: look at the "
                "previous steps in metrics.jsonl"
            )
    return dict(sorted(metrics.items()))


def _append(file: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    rest = memoryview("".join(map(_encode, lines)).encode())
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    except OSError as error:
        raise _write_error(file, error) from error
    try:
        size_before = os.fstat(descriptor).st_size
        try:
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        except OSError as error:
            # Half a line must not stay: the next line would be appended to it.
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, size_before)
            raise _write_error(file, error) from error
    finally:
        os.close(descriptor)


def _encode(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"


_COMPLETION_FIELDS = tuple(field.name for field in fields(CompletionRecord))


def _lines(
    file: Path, *, wanted: Collection[bytes] | None = None
) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield the lines of a file, raw and parsed, except an unfinished last one after a crash.

    ``wanted`` are the beginnings, up to the first comma, of the only lines that are looked at.
    """
    if not file.exists():
        return
    with file.open("rb") as raws:
        for index, raw in enumerate(raws, start=1):
            if not raw.endswith(b"\n"):
                return
            if wanted is not None and raw[: raw.find(b",") + 1] not in wanted:
                continue
            try:
                line = json.loads(raw)
            except ValueError:
                line = None
            if not isinstance(line, dict) or not isinstance(line.get("step"), int):
                raise CheckpointError(
                    f"{file}, line {index} is not a JSON object with a step: {raw[:60]!r}; something other than "
                    "moe-replay wrote to it, or the disk lost data: repair or remove that line, then resume"
                )
            yield raw, line


def _keep_lines(file: Path, keep: Callable[[Mapping[str, Any]], bool]) -> None:
    """Keep only the lines of a file that ``keep`` accepts."""
    if file.exists():
        _replace(file, (raw for raw, line in _lines(file) if keep(line)))


def _replace(file: Path, parts: Iterable[bytes]) -> None:
    """Write a file, or raise and leave the one that was there."""
    try:
        with whole_file(file) as out:
            out.writelines(parts)
    except OSError as error:
        raise _write_error(file, error) from error


def _write_error(file: Path, error: OSError) -> CheckpointError:
    parent = next((path for path in (file, *file.parents) if path.is_dir()), Path("/"))
    free = shutil.disk_usage(parent).free
    advice = (
        "free some space or raise the quota, then resume: no earlier step is lost"
        if error.errno in _NO_SPACE
        else "check that the directory exists and is writable, then resume"
    )
    return CheckpointError(
        f"cannot write {file}: {error.strerror}; {free} bytes are free on that disk; {advice}"
    )
