"""A push of weights to several servers at once: the next part is made while the last one travels.

In: named tensors, servers. Out: the servers that took them.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch

from moe_replay.checkpoint.facts import ModelFacts
from moe_replay.engines.serve.messages import PolicyName
from moe_replay.engines.servers.contract import RolloutServer
from moe_replay.engines.servers.faults import CallError, Fault
from moe_replay.engines.servers.push_files import WeightPart, WeightsFolder, weight_parts
from moe_replay.errors import EngineError


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """What became of a push."""

    urls: tuple[str, ...]
    """Of the servers that loaded it."""
    num_bytes: int
    """Of its files, as they went to each server."""


@runtime_checkable
class SharedWay(Protocol):
    """A way on which a part goes to all servers at once."""

    def form(self, servers: Sequence[RolloutServer], *, must_form: bool) -> None:
        """Make ready for a push to these servers."""
        ...

    def give(self, server: RolloutServer, part: WeightPart) -> None:
        """Give one of them a part."""
        ...

    def leave(self) -> None:
        """Wait no more for a server that has failed."""
        ...


def push(
    weights: Iterable[tuple[str, torch.Tensor]],
    policy: PolicyName,
    servers: Sequence[RolloutServer],
    *,
    folder: WeightsFolder,
    num_bytes: int,
    bucket_bytes: int,
    must_reach_all: bool,
    faults: Counter[Fault],
    broadcast: SharedWay | None = None,
) -> Pushed:
    """Push to every server; all or at least one have loaded it then.

    ``num_bytes`` is the maximum that the weights need in ``folder``, if servers read them from
    files. Parts have about ``bucket_bytes``, and go through ``broadcast`` to all servers at once if
    there is one. Failures are counted in ``faults``.

    Raises:
        EngineError: no server loaded the weights, one refuses them, or the folder has no room.
    """
    if broadcast is None and any(server.reads_files for server in servers):
        folder.need_room(num_bytes)
    name = f"push-{policy.policy_version}"
    if broadcast is not None:
        broadcast.form(servers, must_form=must_reach_all)
    delivery = Delivery(servers, faults, broadcast)
    with (
        weight_parts(weights, folder=folder, push=name, bucket_bytes=bucket_bytes) as parts,
        ThreadPoolExecutor(len(servers)) as threads,
    ):
        try:
            delivery.begin(threads)
            # The stream is read to its end even without servers: other ranks help to make each
            # part.
            for part in parts:
                delivery.offer(part)
                # It must not stay in memory while the next ones are made.
                del part
                delivery.wait_for_room()
            delivery.end()
            delivery.commit(policy, threads)
        except BaseException:
            # Ctrl-C: leaving the scope waits for the threads.
            delivery.give_up()
            raise
    left, errors = delivery.left, delivery.errors
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
    return Pushed(urls=tuple(server.url for server in left), num_bytes=delivery.num_bytes)


def push_bytes(facts: ModelFacts, dtype: torch.dtype) -> int:
    """Return the maximum size on disk of a push in the number format ``dtype``."""
    return sum(
        math.prod(shape) * (4 if name in facts.float32_names else dtype.itemsize)
        for name, shape in facts.weight_shapes.items()
    )


class Delivery:
    """Parts of one push on their way: each server takes them in order, at its own speed.

    At most two parts exist: while one is made, another is with the servers, however many they are.
    A fast server may be one part ahead of a slow one.

    Worked example: servers F and S, parts 0 to 2. Part 0 goes to both while part 1 is made. F is
    done first, and takes part 1 as soon as it is made; part 2 is made once S is done with part 0.
    """

    def __init__(
        self,
        servers: Sequence[RolloutServer],
        faults: Counter[Fault],
        broadcast: SharedWay | None = None,
    ) -> None:
        self.left = list(servers)
        """Those that have not failed."""
        self.errors: list[EngineError] = []
        """Of the others, and refusals."""
        self.num_bytes = 0
        """Of all parts so far."""
        self._servers, self._faults = list(servers), faults
        self._broadcast = broadcast
        self._turn = threading.Condition()
        self._held: dict[int, WeightPart] = {}
        self._owed: dict[int, set[int]] = {}
        self._num_made = 0
        self._is_whole = self._is_given_up = False
        self._feeding: list[Future[None]] = []

    def begin(self, threads: ThreadPoolExecutor) -> None:
        """Let every server wait for parts, in a thread of its own."""
        self._feeding = [threads.submit(self._feed, number) for number in range(len(self._servers))]

    def offer(self, part: WeightPart) -> None:
        """Give all servers that are left the next part."""
        with self._turn:
            owed = {n for n, server in enumerate(self._servers) if server in self.left}
            if owed:
                self._held[part.number], self._owed[part.number] = part, owed
            self._num_made += 1
            self.num_bytes += part.num_bytes
            self._turn.notify_all()

    def wait_for_room(self, max_parts: int = 2) -> None:
        """Wait until another part may be made, so that ``max_parts`` exist then."""
        with self._turn:
            self._turn.wait_for(lambda: len(self._held) < max_parts)

    def end(self) -> None:
        """Wait until every server has taken all parts or failed."""
        with self._turn:
            self._is_whole = True
            self._turn.notify_all()
        for feeding in self._feeding:
            feeding.result()

    def commit(self, policy: PolicyName, threads: ThreadPoolExecutor) -> None:
        """Make the servers that have all parts load them, at once."""
        calls = [
            threads.submit(self._attempt, server.commit_weights, policy, server)
            for server in list(self.left)
        ]
        for call in calls:
            call.result()

    def give_up(self) -> None:
        """End running calls, and begin no others."""
        with self._turn:
            self._is_given_up = True
            self._turn.notify_all()
        if self._broadcast is not None:
            self._broadcast.leave()
        for server in self._servers:
            server.give_up()

    def _feed(self, number: int) -> None:
        """Give one server every part as it comes."""
        server, taken, is_done = self._servers[number], 0, False
        give = server.put_weights
        if self._broadcast is not None:
            give = partial(self._broadcast.give, server)
        try:
            while (part := self._next(server, taken)) is not None:
                self._attempt(give, part, server)
                del part
                self._release(number, taken)
                taken += 1
            is_done = True
        finally:
            with self._turn:
                if not is_done and server in self.left:
                    self.left.remove(server)
                num_made, has_left = self._num_made, server not in self.left
            if self._broadcast is not None and has_left:
                self._broadcast.leave()
            # Whatever ended it: nobody waits until it takes them.
            for part_number in range(taken, num_made):
                self._release(number, part_number)

    def _next(self, server: RolloutServer, number: int) -> WeightPart | None:
        with self._turn:
            self._turn.wait_for(
                lambda: (
                    self._is_given_up
                    or server not in self.left
                    or number < self._num_made
                    or self._is_whole
                )
            )
            if self._is_given_up or server not in self.left:
                return None
            return self._held.get(number)

    def _release(self, server_number: int, part_number: int) -> None:
        with self._turn:
            owed = self._owed.get(part_number)
            if owed is not None:
                owed.discard(server_number)
                if not owed:
                    del self._held[part_number], self._owed[part_number]
            self._turn.notify_all()

    def _attempt(self, call: object, argument: object, server: RolloutServer) -> None:
        """Make a call to a server, and drop it when that fails; all when one refuses."""
        assert callable(call)
        try:
            call(argument)
        except CallError as error:
            with self._turn:
                self._faults[error.fault] += 1
                self.errors.append(error)
                if server in self.left:
                    self.left.remove(server)
                self._turn.notify_all()
        except EngineError as error:
            # What one server refuses, the others would too.
            with self._turn:
                self.errors.append(error)
                self.left.clear()
                self._turn.notify_all()
