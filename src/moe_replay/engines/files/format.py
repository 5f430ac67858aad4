"""Rollouts on disk: completions with their traces, group by group, in files of one policy version.

::

    <folder>/
    ├── <name>.json             manifest, written first: engine, sampling, weights, prompt count
    ├── <name>.shard-0.groups   a record a prompt: tokens, log-probabilities
    ├── <name>.shard-0.traces   trace file: a trace a completion, named <request id>/<index>
    └── <name>.shard-1. ...     what another rank sampled

``<name>`` names engine, number format and policy version. A rollout is complete when its shards
hold every prompt of the manifest, whichever ranks sampled them. Until then its reader refuses it,
and its writer resumes it.

In: RolloutGroups. Out: files, and the groups back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt64
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moe_replay.engines.files.group_log import FORMAT, FoundGroups, find_groups, read_group
from moe_replay.engines.types import EngineDescription, RolloutGroup, SamplingParams
from moe_replay.errors import CodecError, RecipeError
from moe_replay.routing.format.codec import DEFAULT_MAX_BYTES, read_place
from moe_replay.routing.format.trace_file import map_file
from moe_replay.routing.format.whole_file import whole_file

_RESUME = "the same `moe-replay rollout` command resumes it"


class Manifest(BaseModel):
    """What a rollout on disk is."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format: Literal[3] = FORMAT
    """Version of the files."""
    engine: EngineDescription
    """What samples it."""
    policy_version: int = Field(ge=0)
    """Weight pushes that the engine has received."""
    sampling: SamplingParams
    """How it is sampled."""
    first_request: int = Field(ge=0)
    """Lowest request id, which is the position of its prompt among the training prompts."""
    num_requests: int = Field(ge=1)
    """Prompts, from that one on."""
    weights: Mapping[str, str] = Field(default_factory=dict)
    """File of the checkpoint -> digest of what it holds."""

    @property
    def stop_request(self) -> int:
        """One past the highest request id."""
        return self.first_request + self.num_requests


def rollout_name(description: EngineDescription, policy_version: int) -> str:
    """Return what a rollout's files are called, such as ``vllm-bfloat16-policy-0``."""
    return f"{description.name}-{description.dtype}-policy-{policy_version}"


class RolloutFile:
    """A rollout on disk, mapped for reading: a process holds only the groups that it uses.

    Opening finds the groups, 28 bytes of memory each; `group` checks every byte of what it reads.
    ``path`` is a manifest, or a folder that holds exactly one. With ``wanted`` it opens shards only
    until these requests are found, beginning with ``first_shard``.

    Raises:
        RecipeError: when there is none, or more than one.
        CodecError: when a file is damaged or of another version, or the rollout is incomplete.
    """

    def __init__(
        self, path: Path, *, wanted: Sequence[int] | None = None, first_shard: int = 0
    ) -> None:
        self.path = _find_manifest(path)
        """The manifest."""
        self.manifest = read_manifest(self.path)
        """What this rollout is."""
        shards = shard_files(self.path, ".groups")
        if wanted is not None:
            shards.sort(key=lambda shard: shard_number(shard) != first_shard)
        self._shards: list[Path] = []
        self._groups: list[memoryview] = []
        found: list[FoundGroups] = []
        request_ids = np.empty(0, np.uint64)
        for shard in shards:
            self._shards.append(shard)
            self._groups.append(map_file(shard))
            found.append(find_groups(self._groups[-1], str(shard)))
            request_ids = np.concatenate([request_ids, found[-1].request_ids])
            if wanted is not None and np.isin(wanted, request_ids).all():
                break
        order = np.argsort(request_ids, kind="stable")
        self._request_ids = request_ids[order]
        if wanted is None or not np.isin(wanted, request_ids).all():
            self._check_complete(self._request_ids)
        self._starts = np.concatenate([np.empty(0, np.int64), *(e.starts for e in found)])[order]
        self._shard_of = np.repeat(
            np.arange(len(found), dtype=np.int32), [len(each.starts) for each in found]
        )[order]
        self._traces: list[memoryview] = []
        if self.manifest.engine.records_routes:
            self._traces = [map_file(shard.with_suffix(".traces")) for shard in self._shards]

    def __contains__(self, request_id: int) -> bool:
        return self.manifest.first_request <= request_id < self.manifest.stop_request

    @property
    def request_ids(self) -> range:
        """The requests that were answered."""
        return range(self.manifest.first_request, self.manifest.stop_request)

    def group(self, request_id: int) -> RolloutGroup:
        """Return a request with its completions, traces bound to their tokens.

        Raises:
            KeyError: when it was not sampled.
            TraceError: when a record or a trace is damaged, or belongs to other tokens.
        """
        index = int(np.searchsorted(self._request_ids, request_id))
        if index == len(self._request_ids) or self._request_ids[index] != request_id:
            raise KeyError(request_id)
        shard = int(self._shard_of[index])
        stored = read_group(self._groups[shard], int(self._starts[index]), str(self._shards[shard]))
        if not self._traces:
            return stored.group
        file = str(self._shards[shard].with_suffix(".traces"))
        completions = []
        for completion, frame in zip(stored.group.completions, stored.places, strict=True):
            if frame is None:
                raise CodecError(
                    f"{self._shards[shard]}, request {request_id}: a completion names no trace, "
                    "although its engine records routes: the files are not of one rollout; sample it "
                    "again"
                )
            trace = read_place(self._traces[shard], frame, file, max_bytes=DEFAULT_MAX_BYTES)
            tokens = stored.group.request.sequence(completion.token_ids)
            trace.check_tokens(tokens, where=f"{file}, trace {frame.name}")
            completions.append(replace(completion, trace=trace))
        return replace(stored.group, completions=tuple(completions))

    def _check_complete(self, held: UInt64[np.ndarray, " groups"]) -> None:
        """Raise `CodecError` unless every prompt of the manifest is there, once."""
        manifest = self.manifest
        wanted = np.arange(manifest.first_request, manifest.stop_request, dtype=np.uint64)
        if np.array_equal(held, wanted):
            return
        twice = np.unique(held[1:][held[1:] == held[:-1]])
        strange = np.setdiff1d(held, wanted)
        if len(twice) or len(strange):
            raise CodecError(
                f"{self.path}: its shards hold requests {twice[:4].tolist()} more than once and "
                f"{strange[:4].tolist()} that are not among {manifest.first_request} to "
                f"{manifest.stop_request - 1}: two writers sampled it, or its files were mixed with "
                "others; remove it and sample it again"
            )
        missing = np.setdiff1d(wanted, held)
        raise CodecError(
            f"{self.path}: {len(held)} of {manifest.num_requests} prompts are there, request "
            f"{missing[0]} is the first that is missing: it is still being sampled, its writer was "
            f"killed, or a shard is missing; {_RESUME}"
        )


def begin_rollout(folder: Path, manifest: Manifest) -> Path:
    """Write the manifest and return its path.

    An existing one must be of the same rollout, of as many prompts or fewer.

    Raises:
        RecipeError: when the folder holds another rollout of this engine and policy version, or
            cannot be written.
    """
    path = folder / f"{rollout_name(manifest.engine, manifest.policy_version)}.json"
    if path.exists():
        _check_same(path, read_manifest(path), manifest)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(manifest.model_dump_json(indent=2).encode() + b"\n")
    except OSError as error:
        raise RecipeError(f"a rollout cannot be written below {folder}: {error}") from error
    return path


def read_manifest(path: Path) -> Manifest:
    """Return what a manifest says.

    Raises:
        CodecError: when it cannot be read, or is of another version.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CodecError(f"cannot read {path}: {error}") from error
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        others = [each["input"] for each in error.errors() if each["loc"] == ("format",)]
        if others:
            raise CodecError(
                f"{path} is a rollout of format {others[0]}, this release reads format {FORMAT}: "
                "sample it again with `moe-replay rollout RECIPE --output FOLDER` into an empty "
                "folder, or read it with the release that wrote it"
            ) from error
        raise CodecError(f"{path} is not a rollout of format {FORMAT}: {error}") from error


def is_of_other_format(path: Path) -> bool:
    """Whether a manifest is of another version of these files, which this release cannot read."""
    try:
        written = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    number = written.get("format") if isinstance(written, dict) else None
    return isinstance(number, int) and number != FORMAT


def find_manifests(path: Path) -> list[Path]:
    """Return the manifest that ``path`` is, or those in the folder that it is."""
    if path.is_file():
        return [path]
    return sorted(path.glob("*.json")) if path.is_dir() else []


def shard_files(manifest: Path, suffix: str) -> list[Path]:
    """Return a rollout's ``.groups`` or ``.traces`` files in the order of their shards."""
    name = re.compile(rf"{re.escape(manifest.stem)}\.shard-[0-9]+{re.escape(suffix)}")
    found = [path for path in manifest.parent.iterdir() if name.fullmatch(path.name)]
    return sorted(found, key=shard_number)


def shard_file(manifest: Path, shard: int) -> Path:
    """Return the groups file of a shard."""
    return manifest.with_suffix(f".shard-{shard}.groups")


def shard_number(path: Path) -> int:
    """Return which shard a file belongs to."""
    return int(path.stem.rpartition("-")[2])


def _find_manifest(path: Path) -> Path:
    found = find_manifests(path)
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


def _check_same(path: Path, old: Manifest, new: Manifest) -> None:
    """Raise `RecipeError` unless ``new`` resumes what ``old`` has begun."""
    was, now = (
        _flat(each.model_dump(mode="json", exclude={"num_requests"})) for each in (old, new)
    )
    odd = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
    if odd:
        shown = "; ".join(f"{key}: was {was.get(key)}, is {now.get(key)}" for key in odd[:6])
        raise RecipeError(
            f"{path} exists and is another rollout ({shown}): choose another folder, or remove its "
            "files; with the same recipe and model it would be resumed"
        )
    if new.num_requests < old.num_requests:
        raise RecipeError(
            f"{path} exists and was begun for {old.num_requests} prompts, now {new.num_requests} are "
            "asked for: ask for as many or more, or choose another folder"
        )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = prefix + key
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat
