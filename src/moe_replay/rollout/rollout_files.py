"""Rollouts on disk: completions with their traces, written at once or not at all, each engine's apart from the others'.

::

    <folder>/
    ├── <name>.traces    trace file of the codec, one trace a completion, named <request id>/<number>
    ├── <name>.jsonl     one line a request: prompt, and for each completion tokens, log-probabilities, why it ended
    └── <name>.json      manifest: the engine, how it sampled, and the checksum of the lines; written last

``<name>`` says engine, number format and policy version, so that what two engines sampled never mixes. Without its
manifest a rollout does not exist: its writer died.

In: RolloutGroups. Out: files, and the groups back. Called by: rollout.files_engine, cli.rollout.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moe_replay.errors import CodecError, RecipeError
from moe_replay.rollout.types import (
    Completion,
    EngineDescription,
    FinishReason,
    Request,
    RolloutGroup,
    SamplingParams,
    check_group,
)
from moe_replay.routing import Encoding, RoutingTrace, TraceFile, write_trace_file

FORMAT = 1
"""Version of these files; a reader refuses every other one."""


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Manifest(_Stored):
    """What a rollout on disk is."""

    format: Literal[1]
    """`FORMAT` of the writer."""
    engine: EngineDescription
    """What sampled it."""
    policy_version: int = Field(ge=0)
    """Weight pushes that the engine had received."""
    sampling: SamplingParams
    """How it was sampled."""
    num_requests: int = Field(ge=1)
    """Lines of the completions file."""
    sha256: str
    """Of the completions file."""


_TokenIds = list[Annotated[int, Field(ge=0, lt=1 << 31)]]


class _StoredCompletion(_Stored):
    token_ids: _TokenIds
    rollout_logprobs: list[float]
    finish_reason: FinishReason
    policy_version: int = Field(ge=0)


class _StoredRequest(_Stored):
    request_id: int = Field(ge=0)
    prompt_ids: _TokenIds
    completions: Annotated[list[_StoredCompletion], Field(min_length=1)]


def rollout_name(description: EngineDescription, policy_version: int) -> str:
    """Return the name of a rollout's files, such as ``vllm-bfloat16-policy-0``."""
    return f"{description.name}-{description.dtype}-policy-{policy_version}"


def write_rollout(
    folder: Path,
    groups: Iterable[RolloutGroup],
    *,
    description: EngineDescription,
    policy_version: int,
    sampling: SamplingParams,
) -> Path:
    """Write a rollout and return its manifest; ``groups`` may be a generator, of which one group at a time is held.

    Raises:
        RecipeError: when the folder holds a rollout of this engine and policy version already, or cannot be written.
        EngineError: when a group does not keep the contract of every engine.
    """
    manifest = folder / f"{rollout_name(description, policy_version)}.json"
    if manifest.exists():
        raise RecipeError(
            f"{manifest} exists: this folder holds a rollout of that engine and policy version; choose another folder, or "
            "remove its three files"
        )
    lines = manifest.with_suffix(".jsonl")
    unfinished = [
        path.with_name(f".{path.name}.{os.getpid()}.unfinished") for path in (lines, manifest)
    ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with unfinished[0].open("wb") as file:
            written = _Lines(file)
            # In the order of the engine: sums over the experts of a set round otherwise in another one.
            write_trace_file(
                manifest.with_suffix(".traces"),
                written.traces_of(groups, description),
                encoding=Encoding.ORDERED,
            )
            _flush(file)
        told = Manifest(
            format=FORMAT,
            engine=description,
            policy_version=policy_version,
            sampling=sampling,
            num_requests=written.count,
            sha256=written.digest.hexdigest(),
        )
        with unfinished[1].open("wb") as file:
            file.write(told.model_dump_json(indent=2).encode() + b"\n")
            _flush(file)
        unfinished[0].replace(lines)
        unfinished[1].replace(manifest)
    except OSError as error:
        raise RecipeError(f"a rollout cannot be written below {folder}: {error}") from error
    finally:
        for path in unfinished:
            path.unlink(missing_ok=True)
    return manifest


class RolloutFile:
    """A rollout on disk, opened for reading: the lines are checked at once, a trace whenever it is read.

    ``path`` is a manifest, or a folder that holds exactly one.

    Raises:
        RecipeError: when there is none, or more than one.
        CodecError: when a file is damaged, or of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = _find_manifest(path)
        """The manifest."""
        lines = self._read(self.path.with_suffix(".jsonl"))
        try:
            self.manifest = Manifest.model_validate_json(self._read(self.path))
            """What this rollout is."""
            if hashlib.sha256(lines).hexdigest() != self.manifest.sha256:
                raise CodecError(
                    f"{self.path.with_suffix('.jsonl')}: its checksum is not the one in the manifest; it was altered, or is "
                    "another rollout's"
                )
            stored = [_StoredRequest.model_validate_json(line) for line in lines.splitlines()]
        except ValidationError as error:
            raise CodecError(f"{self.path} is no rollout of format {FORMAT}: {error}") from error
        self._requests = {request.request_id: request for request in stored}
        if not len(self._requests) == len(stored) == self.manifest.num_requests:
            raise CodecError(
                f"{self.path} tells of {self.manifest.num_requests} requests, its lines of {len(self._requests)} different "
                f"ones in {len(stored)}; it was altered"
            )
        self._traces = TraceFile(self.path.with_suffix(".traces"))

    @property
    def request_ids(self) -> tuple[int, ...]:
        """The requests that were answered, in the order in which they were sampled."""
        return tuple(self._requests)

    def group(self, request_id: int) -> RolloutGroup:
        """Return a request with its completions, traces bound to their tokens.

        Raises:
            KeyError: when it was not sampled.
            TraceError: when a trace is missing, damaged, or belongs to other tokens.
        """
        stored = self._requests[request_id]
        prompt_ids = np.array(stored.prompt_ids, dtype=np.int32)
        request = Request(
            request_id=request_id, prompt_ids=prompt_ids, num_generations=len(stored.completions)
        )
        return RolloutGroup(
            request=request,
            completions=tuple(
                self._completion(request, number, completion)
                for number, completion in enumerate(stored.completions)
            ),
        )

    def _completion(self, request: Request, number: int, stored: _StoredCompletion) -> Completion:
        token_ids = np.array(stored.token_ids, dtype=np.int32)
        trace = None
        if self.manifest.engine.records_routes:
            trace = self._traces.read(trace_name(request.request_id, number))
            trace.check_tokens(
                np.concatenate([request.prompt_ids, token_ids]),
                where=f"{self.path}: request {request.request_id}, completion {number}",
            )
        return Completion(
            token_ids=token_ids,
            rollout_logprobs=np.array(stored.rollout_logprobs, dtype=np.float32),
            trace=trace,
            finish_reason=stored.finish_reason,
            policy_version=stored.policy_version,
        )

    def _read(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise CodecError(f"cannot read {path}: {error}") from error


class _Lines:
    """The completions file while it is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.count = 0

    def traces_of(
        self, groups: Iterable[RolloutGroup], description: EngineDescription
    ) -> Iterator[tuple[str, RoutingTrace]]:
        """Write a line for each group, and yield its traces by name."""
        for group in groups:
            check_group(group, description)
            line = _line(group)
            self._file.write(line)
            self.digest.update(line)
            self.count += 1
            for number, completion in enumerate(group.completions):
                if completion.trace is not None:
                    yield trace_name(group.request.request_id, number), completion.trace


def trace_name(request_id: int, number: int) -> str:
    """Return the name of a completion's trace in its trace file."""
    return f"{request_id}/{number}"


def _find_manifest(path: Path) -> Path:
    if path.is_file():
        return path
    found = sorted(path.glob("*.json")) if path.is_dir() else []
    if len(found) != 1:
        raise RecipeError(
            f"{path} holds {len(found)} rollouts {[each.name for each in found[:8]]}, expected one: "
            + (
                "name the manifest of one of them, they were sampled by different engines or policies"
                if found
                else "write one with `moe-replay rollout RECIPE --output FOLDER`"
            )
        )
    return found[0]


def _line(group: RolloutGroup) -> bytes:
    stored = _StoredRequest(
        request_id=group.request.request_id,
        prompt_ids=group.request.prompt_ids.tolist(),
        completions=[
            _StoredCompletion(
                token_ids=completion.token_ids.tolist(),
                rollout_logprobs=completion.rollout_logprobs.tolist(),
                finish_reason=completion.finish_reason,
                policy_version=completion.policy_version,
            )
            for completion in group.completions
        ],
    )
    return stored.model_dump_json().encode() + b"\n"


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
