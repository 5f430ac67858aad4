"""Ahead: the rollout of the next step, sampled beside the trainer and kept until it is taken.

A background thread calls `Engine.generate` and nothing else: collectives stay in the main thread. A
checkpoint holds the rollout that the next step will take, because the weights that sampled it are
gone by then.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from moe_replay.engines.files.format import (
    Manifest,
    RolloutFile,
    begin_rollout,
    find_manifests,
    is_of_other_format,
    read_manifest,
)
from moe_replay.engines.files.writer import RolloutWriter
from moe_replay.engines.types import (
    Engine,
    EngineDescription,
    Request,
    RolloutGroup,
    SamplesBeside,
    SamplingParams,
)
from moe_replay.errors import RecipeError, UnsupportedError
from moe_replay.recipe.sections.rollout import RolloutSection

ROLLOUT_FOLDER = "rollout"
"""Of a checkpoint: the completions that the next step learns from, if they are there already."""
# Maximum wait for a call that was cancelled, and time between two attempts to cancel it.
_LEAVE_S, _AGAIN_S = 60.0, 0.05
_NAME = "ahead"


class Ahead:
    """At most one call of an engine under way, and at most one rollout that has come of it.

    ::

        nothing --start--> under way --wait--> held --take--> taken --keep--> nothing
                               |                 ^              |
                             cancel              +--- put_back -+
    """

    def __init__(self) -> None:
        self.held: list[RolloutGroup] | None = None
        """What the next step will take: this rank's groups, as the engine returned them."""
        self._call: _BackgroundCall | None = None
        self._taken: list[RolloutGroup] | None = None

    @property
    def is_under_way(self) -> bool:
        """Whether something is being sampled."""
        return self._call is not None

    def start(self, engine: Engine, requests: Sequence[Request], sampling: SamplingParams) -> None:
        """Sample ``requests`` in the background."""
        assert self._call is None and self.held is None
        self._call = _BackgroundCall(engine, requests, sampling)

    def wait(self) -> list[RolloutGroup]:
        """Return what was sampled in the background, when all of it is there.

        Raises:
            Exception: whatever the engine raised.
        """
        assert self._call is not None
        groups = self._call.result()
        self._call = None
        return groups

    def take(self) -> list[RolloutGroup] | None:
        """Return what is held, for the step that begins; None where nothing is."""
        self._taken, self.held = self.held, None
        return self._taken

    def keep(self) -> None:
        """Forget what was taken: the step that took it will be finished."""
        self._taken = None

    def put_back(self) -> None:
        """Hold what was taken again: the step that took it is dropped."""
        self.cancel()
        if self._taken is not None:
            self.held, self._taken = self._taken, None

    def cancel(self) -> None:
        """End the call under way, if there is one, and drop what it has sampled."""
        if self._call is not None:
            self._call.cancel()
            self._call = None


class _BackgroundCall:
    """One call of `Engine.generate` in a thread."""

    def __init__(
        self, engine: Engine, requests: Sequence[Request], sampling: SamplingParams
    ) -> None:
        self._engine = engine
        self._groups: list[RolloutGroup] = []
        self._error: Exception | None = None
        self._is_over = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(requests, sampling), name="rollout-ahead", daemon=True
        )
        self._thread.start()

    def _run(self, requests: Sequence[Request], sampling: SamplingParams) -> None:
        try:
            self._groups = self._engine.generate(requests, sampling)
        except Exception as error:  # noqa: BLE001 - the seam: the engine may be the user's
            self._error = error
        finally:
            self._is_over.set()

    def result(self) -> list[RolloutGroup]:
        # An event, because a wait for a thread cannot be broken off by a signal.
        self._is_over.wait()
        if self._error is not None:
            raise self._error
        return self._groups

    def cancel(self) -> None:
        engine, until = self._engine, time.monotonic() + _LEAVE_S
        assert isinstance(engine, SamplesBeside)
        # Again and again: the first may come before the engine has begun.
        while self._thread.is_alive() and time.monotonic() < until:
            engine.cancel()
            self._thread.join(_AGAIN_S)


def check_beside(engine: Engine, section: RolloutSection) -> None:
    """Raise `UnsupportedError` where an engine does not say that it samples beside the trainer."""
    if section.max_staleness and not isinstance(engine, SamplesBeside):
        raise UnsupportedError(
            f"rollout.max_staleness is {section.max_staleness}, and the engine "
            f"{engine.description.name} ({type(engine).__name__}) has no method `cancel`, by which "
            "an engine says that it samples on resources of its own while the trainer computes: "
            "add it (see moe_replay.engines.types.SamplesBeside), or set max_staleness = 0"
        )


def begin_saving(
    folder: Path,
    description: EngineDescription,
    sampling: SamplingParams,
    *,
    policy_version: int,
    requests: range,
) -> None:
    """Write what the held rollout of all ranks is; the first rank calls this before the others."""
    manifest = Manifest(
        engine=replace(description, name=_NAME),
        policy_version=policy_version,
        sampling=sampling,
        first_request=requests.start,
        num_requests=len(requests),
    )
    with _as_failed_write():
        begin_rollout(folder, manifest)


def save_groups(folder: Path, groups: Sequence[RolloutGroup], *, rank: int, num_ranks: int) -> None:
    """Write this rank's groups of the held rollout beside its manifest.

    The writer flushes its own files. Their names are flushed once, with the checkpoint.
    """
    (manifest,) = find_manifests(folder)
    with _as_failed_write(), RolloutWriter(manifest, rank=rank, num_ranks=num_ranks) as writer:
        for group in groups:
            writer.write(group)
        writer.finish()


def load_groups(
    folder: Path, requests: Sequence[Request], sampling: SamplingParams, *, rank: int
) -> list[RolloutGroup] | None:
    """Return what was saved for ``requests``; None where the run asks for something else by now.

    A run that was resumed with a change, such as another dataset, does. None too where another
    revision saved it in another format; `why_dropped` says which. Only the files of ``rank`` are
    opened where it saved them all, as it did in the same layout.

    Raises:
        CodecError: when a file is damaged.
        TraceError: when a trace belongs to other tokens.
    """
    (path,) = find_manifests(folder)
    if is_of_other_format(path):
        return None
    manifest, wanted = read_manifest(path), [request.request_id for request in requests]
    held = range(manifest.first_request, manifest.stop_request)
    if manifest.sampling != sampling or not all(number in held for number in wanted):
        return None
    saved = RolloutFile(path, wanted=wanted, first_shard=rank)
    groups = []
    for request in requests:
        group = saved.group(request.request_id)
        asked = group.request
        if asked.num_generations != request.num_generations or not np.array_equal(
            asked.prompt_ids, request.prompt_ids
        ):
            return None
        groups.append(group)
    return groups


def why_dropped(folder: Path) -> str:
    """Return why a rollout that was saved cannot be taken, as `load_groups` says, in words."""
    if any(is_of_other_format(path) for path in find_manifests(folder)):
        return "was written by another revision, in another format of rollouts"
    return "was sampled for other prompts or in another way than this recipe asks for"


@contextmanager
def _as_failed_write() -> Iterator[None]:
    """Raise the refusal of a disk as the `RuntimeError` that a checkpoint's write is told of."""
    try:
        yield
    except RecipeError as error:
        raise RuntimeError(str(error)) from error
