"""What the server engine asks of each of its servers, whichever protocol they speak, and the parts of a weight push.

In: weights, completions. Out: `RolloutServer`, `WeightPart`, checked groups. Called by: rollout.server_engine, rollout.server_calls,
rollout.sglang_calls, rollout.vllm_calls.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from safetensors.torch import save as save_tensors

from moe_replay.errors import EngineError, RecipeError, TraceError
from moe_replay.rollout.http_calls import CallError, Fault
from moe_replay.rollout.model_facts import ModelFacts
from moe_replay.rollout.server_messages import CHECKPOINT, PolicyName, Status
from moe_replay.rollout.types import (
    Completion,
    EngineDescription,
    Request,
    RolloutGroup,
    SamplingParams,
    check_group,
)

_PART_BYTES = 256 << 20


class WeightPart:
    """A part of a push: a safetensors file, held as bytes and written for servers that read files, once for all of them."""

    def __init__(self, number: int, content: bytes, folder: _Folder) -> None:
        self.number = number
        """Place in the push, from 0."""
        self.content = content
        """The file."""
        self._folder = folder

    @property
    def path(self) -> Path:
        """Where the file lies until the push is over; reading this writes it.

        Raises:
            RecipeError: when no folder was named for it.
            EngineError: when it cannot be written.
        """
        return self._folder.save(f"model-{self.number:05d}.safetensors", self.content)


@runtime_checkable
class RolloutServer(Protocol):
    """One server. Threads may call it at the same time."""

    url: str
    """Its address."""
    how_to_record: str
    """Why it may record no routes and what to do about it, for a message."""

    def status(self) -> Status:
        """Return what the server is and which weights it holds.

        Raises:
            RecipeError: when it refuses the token, or is no server of this kind.
            CallError: when it does not answer.
        """
        ...

    def check(self) -> None:
        """Try out what `status` cannot tell, once before anything is sampled.

        Raises:
            RecipeError: when the server answers otherwise than every engine must.
            CallError: when it does not answer.
        """
        ...

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingParams,
        *,
        policy: PolicyName,
        description: EngineDescription,
    ) -> list[RolloutGroup]:
        """Return completions that keep the contract of every engine, sampled by exactly the weights of ``policy``.

        Raises:
            EngineError: when the server refuses the requests themselves.
            CallError: for every other failure.
        """
        ...

    def put_weights(self, part: WeightPart) -> None:
        """Give the server a part of a push, in order from part 0.

        Raises:
            CallError: when it does not take it.
        """
        ...

    def commit_weights(self, policy: PolicyName) -> None:
        """Let the server load the parts that it was given, as ``policy``.

        Raises:
            EngineError: when the weights are not those of the server's model.
            CallError: when it does not answer.
        """
        ...

    def close(self) -> None:
        """Close the connections."""
        ...


def check_policy(answered: PolicyName, wanted: PolicyName, url: str) -> None:
    """Raise `CallError` unless a server answered by the weights that were asked for.

    A run that has pushed nothing yet asks for the checkpoint, under its own name.
    """
    at_start = answered.run == CHECKPOINT and wanted.policy_version == 0
    if answered != wanted and not at_start:
        raise CallError(
            Fault.STALE,
            f"{url} answered by policy version {answered.policy_version} of {answered.run}, expected "
            f"{wanted.policy_version} of {wanted.run}",
        )


def join_groups(
    requests: Sequence[Request],
    completions: Sequence[Completion],
    *,
    description: EngineDescription,
    url: str,
) -> list[RolloutGroup]:
    """Return completions as the groups of their requests.

    Raises:
        CallError: when a group does not keep the contract of every engine.
    """
    groups, start = [], 0
    for request in requests:
        stop = start + request.num_generations
        groups.append(RolloutGroup(request=request, completions=tuple(completions[start:stop])))
        start = stop
    try:
        for group in groups:
            check_group(group, description)
    except (TraceError, EngineError) as error:
        raise CallError(Fault.CORRUPT, f"{url}: {error}") from error
    return groups


@contextmanager
def weight_parts(
    weights: Iterable[tuple[str, torch.Tensor]], *, folder: Path | None
) -> Iterator[Iterator[WeightPart]]:
    """Yield the parts of a push, of about 256 MiB each; their files are gone when the scope is left.

    ``folder`` is where the files lie, in a folder of their own; memory-backed storage makes them cheap.
    """
    own = _Folder(folder)
    try:
        yield (WeightPart(number, part, own) for number, part in enumerate(_contents(weights)))
    finally:
        own.remove()


class _Folder:
    """A folder that exists from its first file on."""

    def __init__(self, parent: Path | None) -> None:
        self._parent = parent
        self._path: Path | None = None
        self._saved: set[str] = set()
        self._lock = threading.Lock()

    def save(self, name: str, content: bytes) -> Path:
        """Write a file unless that was done before, and return its path."""
        if self._parent is None:
            raise RecipeError(
                "servers that read weights from files need a folder for them; name one that they can read"
            )
        with self._lock:
            try:
                if self._path is None:
                    self._path = Path(tempfile.mkdtemp(prefix="moe-replay-", dir=self._parent))
                if name not in self._saved:
                    (self._path / name).write_bytes(content)
                    self._saved.add(name)
            except OSError as error:
                raise EngineError(
                    f"weights cannot be written for the servers below {self._parent}: {error}; make room, or set "
                    "rollout.weights_dir to a folder that trainer and servers share"
                ) from error
            return self._path / name

    def remove(self) -> None:
        """Remove the folder and its files."""
        if self._path is not None:
            shutil.rmtree(self._path, ignore_errors=True)


def _contents(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[bytes]:
    part: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in weights:
        part[name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
        if size >= _PART_BYTES:
            yield save_tensors(part)
            part, size = {}, 0
    if part:
        yield save_tensors(part)


def check_server(
    server: RolloutServer,
    description: EngineDescription,
    facts: ModelFacts,
    dtype: str,
    record_routes: bool,
) -> None:
    """Raise `RecipeError` unless a server serves the recipe's model as the recipe needs it."""
    url = server.url
    if record_routes and not description.records_routes:
        raise RecipeError(
            f"{url} records no routes, which router_replay_mode = 'R3' replays: {server.how_to_record}"
        )
    if description.dtype != dtype:
        raise RecipeError(
            f"{url} samples in {description.dtype}, rollout.dtype is {dtype!r}; change that, or start the server with "
            f"--dtype {dtype}"
        )
    routed = facts.routed
    theirs = (description.moe_layers, description.num_experts, description.topk)
    ours = (routed.moe_layers, routed.num_experts, routed.topk) if routed else ((), 0, 0)
    if theirs != ours:
        raise RecipeError(
            f"{url} serves a model with (MoE layers, experts, top-k) {theirs}, the recipe's has {ours}; serve model.path"
        )
