"""A push of weights to several servers at once, which needs one part of them in memory and loses no server in silence.

In: named tensors, servers. Out: the servers that took them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from moe_replay.checkpoint.facts import ModelFacts
from moe_replay.engines.serve.messages import PolicyName
from moe_replay.engines.servers.contract import (
    PlainServer,
    RolloutServer,
    WeightPart,
    weight_parts,
)
from moe_replay.engines.servers.http import CallError, Fault
from moe_replay.engines.servers.weights_folder import WeightsFolder
from moe_replay.errors import EngineError


def push(
    weights: Iterable[tuple[str, torch.Tensor]],
    policy: PolicyName,
    servers: Sequence[RolloutServer],
    *,
    folder: WeightsFolder,
    num_bytes: int,
    must_reach_all: bool,
    faults: Counter[Fault],
) -> list[str]:
    """Push to every server and return the URLs of those that took it; at least one did, or all if they must.

    ``num_bytes`` is the most that the weights need in ``folder``, where servers read them that take files. What went wrong
    with a server is counted in ``faults``.

    Raises:
        EngineError: no server took the weights, one refuses them, or the folder has no room.
    """
    left, errors = list(servers), list[EngineError]()
    if any(isinstance(server, PlainServer) for server in left):
        folder.need_room(num_bytes)
    name = f"push-{policy.policy_version}"
    with (
        weight_parts(weights, folder=folder, push=name) as parts,
        ThreadPoolExecutor(len(left)) as threads,
    ):
        try:
            # Every part is taken from the stream even if no server is left: other ranks take part in making it.
            for part in parts:
                _at_all("put_weights", part, left, errors, threads, faults)
                # Else it would be there while the next one is made.
                del part
            _at_all("commit_weights", policy, left, errors, threads, faults)
        except BaseException:
            # Ctrl-C: leaving the scope waits for the threads.
            for server in servers:
                server.give_up()
            raise
    refused = [error for error in errors if not isinstance(error, CallError)]
    if refused:
        raise refused[0]
    if not left or (errors and must_reach_all):
        at_start = " at the start, so no later push would work either" if must_reach_all else ""
        took = "no server" if not left else f"only {len(left)} of {len(servers)} servers"
        raise EngineError(
            f"{took} took policy version {policy.policy_version}{at_start}: {'; '.join(map(str, errors))}; start them again "
            "and resume the run"
        )
    return [server.url for server in left]


def push_bytes(facts: ModelFacts, dtype: torch.dtype) -> int:
    """Return the most bytes that a push in the number format ``dtype`` has on disk."""
    return sum(
        math.prod(shape) * (4 if name in facts.float32_names else dtype.itemsize)
        for name, shape in facts.weight_shapes.items()
    )


def _at_all(
    call: str,
    argument: WeightPart | PolicyName,
    left: list[RolloutServer],
    errors: list[EngineError],
    threads: ThreadPoolExecutor,
    faults: Counter[Fault],
) -> None:
    """Make a call to the servers that are left, at once; whichever fails is left out from then on."""
    calls = [(server, threads.submit(getattr(server, call), argument)) for server in left]
    for server, result in calls:
        try:
            result.result()
        except CallError as error:
            faults[error.fault] += 1
            errors.append(error)
            if server in left:
                left.remove(server)
        except EngineError as error:
            # What one server refuses, the others would too.
            errors.append(error)
            left.clear()
