"""A push of weights to several servers at once, which holds one part of them in memory at a time.

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
from moe_replay.engines.servers.contract import RolloutServer
from moe_replay.engines.servers.faults import CallError, Fault
from moe_replay.engines.servers.push_files import WeightPart, WeightsFolder, weight_parts
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
    """Push to every server and return the URLs of those that loaded it, all or at least one.

    ``num_bytes`` is the maximum that the weights need in ``folder``, if servers read them from
    files. Failures are counted in ``faults``.

    Raises:
        EngineError: no server loaded the weights, one refuses them, or the folder has no room.
    """
    left, errors = list(servers), list[EngineError]()
    if any(server.reads_files for server in left):
        folder.need_room(num_bytes)
    name = f"push-{policy.policy_version}"
    with (
        weight_parts(weights, folder=folder, push=name) as parts,
        ThreadPoolExecutor(len(left)) as threads,
    ):
        try:
            # The stream is read to its end even without servers: other ranks help to make each
            # part.
            for part in parts:
                _at_all("put_weights", part, left, errors, threads, faults)
                # It must not stay in memory while the next one is made.
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
            f"{took} took policy version {policy.policy_version}{at_start}: "
            f"{'; '.join(map(str, errors))}; start them again and resume the run"
        )
    return [server.url for server in left]


def push_bytes(facts: ModelFacts, dtype: torch.dtype) -> int:
    """Return the maximum size on disk of a push in the number format ``dtype``."""
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
    """Make a call to the remaining servers, at once, and drop those that fail."""
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
