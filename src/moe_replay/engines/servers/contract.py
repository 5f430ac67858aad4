"""What the server engine asks of each of its servers, whichever protocol they speak, and the parts of a weight push.

In: weights, completions. Out: `RolloutServer`, `WeightPart`, checked groups.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from safetensors.torch import save as save_tensors

from moe_replay.checkpoint.facts import ModelFacts
from moe_replay.engines.serve.messages import CHECKPOINT, PolicyName, Progress, Status
from moe_replay.engines.servers.http import CallError, Fault
from moe_replay.engines.servers.weights_folder import WeightsFolder
from moe_replay.engines.types import (
    Completion,
    EngineDescription,
    Request,
    RolloutGroup,
    SamplingParams,
    check_group,
)
from moe_replay.errors import RecipeError

PART_BYTES = 256 << 20
"""A part of a push is closed by the tensor that brings it to this size."""


class WeightPart:
    """A part of a push: a safetensors file, held as bytes and written for servers that read files, once for all of them."""

    def __init__(self, number: int, content: bytes, folder: WeightsFolder, push: str) -> None:
        self.number = number
        """Place in the push, from 0."""
        self.content = content
        """The file."""
        self._folder, self._push = folder, push
        self._path: Path | None = None
        self._turn = threading.Lock()

    @property
    def path(self) -> Path:
        """Where the file lies until the push is over; reading this writes it.

        Raises:
            RecipeError: when no folder was named for it.
            EngineError: when it cannot be written.
        """
        with self._turn:
            if self._path is None:
                name = f"model-{self.number:05d}.safetensors"
                self._path = self._folder.save(self._push, name, self.content)
            return self._path


@runtime_checkable
class RolloutServer(Protocol):
    """One server. Threads may call it at the same time."""

    url: str
    """Its address."""
    how_to_record: str
    """Why it may record no routes and what to do about it, for a message."""

    @property
    def draws_by_seed(self) -> bool:
        """Whether a completion that is sampled again, with the same seed, comes out the same."""
        ...

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
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> list[RolloutGroup]:
        """Return completions that keep the contract of every engine, sampled by exactly the weights of ``policy``.

        ``on_progress`` may be called now and then, in any thread.

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

    def give_up(self) -> None:
        """Close the connections of all calls under way, which makes the server cancel them; they raise `GivenUpError`."""
        ...

    def close(self) -> None:
        """Close the connections."""
        ...


@runtime_checkable
class PlainServer(Protocol):
    """What a server can do that is asked for completions one by one, so that one that fails costs no other."""

    def complete(
        self,
        request: Request,
        numbers: Sequence[int],
        sampling: SamplingParams,
        *,
        policy: PolicyName,
        description: EngineDescription,
        keep: Callable[[int, Completion], None],
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        """Sample the completions ``numbers`` of a request, and give each to ``keep`` once nothing speaks against it.

        ``on_progress`` may be called now and then, in any thread.

        Raises:
            EngineError: when the server refuses the request itself.
            CallError: when some could not be sampled; the others were kept.
        """
        ...

    def is_up(self) -> bool:
        """Tell whether the server and its engine live, after a call has failed."""
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


def check_completion(
    request: Request, completion: Completion, *, description: EngineDescription
) -> None:
    """Raise unless one completion of a request keeps the contract of every engine."""
    alone = replace(request, num_generations=1)
    check_group(RolloutGroup(request=alone, completions=(completion,)), description)


def generate_by_one(
    server: PlainServer,
    requests: Sequence[Request],
    sampling: SamplingParams,
    *,
    policy: PolicyName,
    description: EngineDescription,
) -> list[RolloutGroup]:
    """Return whole groups of a server that is asked for completions one by one."""
    groups = []
    for request in requests:
        kept: dict[int, Completion] = {}
        numbers = range(request.num_generations)
        server.complete(
            request,
            numbers,
            sampling,
            policy=policy,
            description=description,
            keep=kept.__setitem__,
        )
        completions = tuple(kept[number] for number in numbers)
        groups.append(RolloutGroup(request=request, completions=completions))
    return groups


@contextmanager
def weight_parts(
    weights: Iterable[tuple[str, torch.Tensor]], *, folder: WeightsFolder, push: str
) -> Iterator[Iterator[WeightPart]]:
    """Yield the parts of a push, each of whole tensors and about 256 MiB; their files are gone when the scope is left.

    One part is in memory at a time. Their files, if a server reads any, lie in the folder ``push`` of ``folder``.
    """
    try:
        yield (
            WeightPart(number, content, folder, push)
            for number, content in enumerate(_contents(weights))
        )
    finally:
        folder.remove(push)


def _contents(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[bytes]:
    part: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in weights:
        part[name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
        # No reference may stay behind while a part is on its way.
        del tensor
        if size >= PART_BYTES:
            yield _taken(part)
            size = 0
    if part:
        yield _taken(part)


def _taken(part: dict[str, torch.Tensor]) -> bytes:
    content = save_tensors(part)
    part.clear()
    return content


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
