"""Parts of a push sent once to all servers, through a process group, and over HTTP where it breaks.

In: parts, servers. Out: the same parts on each of them.
"""

from __future__ import annotations

import ipaddress
import threading
import uuid
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import numpy as np

from moe_replay.engines.serve.messages import MAX_CHUNK_BYTES, TransferStart
from moe_replay.engines.servers.contract import GroupServer, RolloutServer
from moe_replay.engines.servers.faults import CallError, Fault
from moe_replay.engines.servers.push_files import WeightPart
from moe_replay.engines.transfer_group import (
    Backend,
    TransferGroup,
    check_backend,
    open_store,
    own_address,
)
from moe_replay.engines.vllm_group import VllmGroup, free_port
from moe_replay.errors import EngineError, RecipeError


class Broadcast:
    """A process group of this trainer and its servers, made again after it has broken.

    Each server's thread calls `give` with each part in turn. When all have announced it, the last
    of them sends it to all; then each asks its server whether it arrived. Once a server fails, the
    group is closed, so that no member waits in it any longer, and this and the later parts of the
    push go to the others over HTTP. The next push forms a new group.

    Worked example: servers A and B, and B dies while part 3 is sent. The broadcast fails; A says
    that it did not get part 3 and takes it over HTTP, then parts 4 and 5, and is committed. B fails
    over HTTP too, and is dropped as it would be without a group. Of vLLM's own servers, which have
    replaced some of their weights by then, both are dropped, and have to be started again.

    Raises:
        RecipeError: when this process has no such transport, or a server is not ours or has TLS.
    """

    def __init__(
        self, backend: Backend, servers: Sequence[RolloutServer], faults: Counter[Fault]
    ) -> None:
        for server in servers:
            if urlsplit(server.url).scheme == "https":
                raise RecipeError(
                    f"rollout.weight_transfer is {backend!r}, and {server.url} has TLS, which does not "
                    "cover the group that weights would go through: they would travel in the clear; "
                    "set it to 'auto', or use http:// on a network that only trainers and servers reach"
                )
        check_backend(backend)
        kinds = set()
        for server in servers:
            if not isinstance(server, GroupServer) or (server.takes_tensors and backend == "gloo"):
                raise RecipeError(
                    f"rollout.weight_transfer is {backend!r}, which {server.url} has not: servers of "
                    "`moe-replay serve` have 'gloo' and 'nccl', plain vLLM servers 'nccl', SGLang's "
                    "none; set it to 'auto'"
                )
            kinds.add(server.takes_tensors)
        if len(kinds) > 1:
            raise RecipeError(
                f"rollout.weight_transfer is {backend!r}, and some servers are of `moe-replay serve` and "
                "some of vLLM, which take weights in different groups; use one kind, or 'auto'"
            )
        self._backend: Backend = backend
        self._faults = faults
        self._turn = threading.Condition()
        self._group: TransferGroup | VllmGroup | None = None
        self._members: dict[str, GroupServer] = {}
        self._transfer = ""
        self._is_sending = False
        self._arrived: set[str] = set()
        self._outcomes: dict[int, bool] = {}
        self.num_sent = 0
        """Parts that all servers of the group got through it."""

    @property
    def is_formed(self) -> bool:
        """Whether parts go through the group."""
        return self._group is not None

    def form(self, servers: Sequence[RolloutServer], *, must_form: bool) -> None:
        """Make the group of these servers, unless it stands; without those that do not answer.

        If they do not find each other, parts go over HTTP, unless the group ``must_form``.

        Raises:
            EngineError: when a server has no such transport, or they do not find each other.
        """
        self._arrived, self._outcomes = set(), {}
        if self._group is not None and self._members.keys() == {s.url for s in servers}:
            return
        self.close()
        ours = [server for server in servers if isinstance(server, GroupServer)]
        takes_tensors = ours[0].takes_tensors
        address = _address_for(ours)
        store = None if takes_tensors else open_store(address)
        port = free_port() if store is None else store.port
        self._transfer = uuid.uuid4().hex
        starts = self._starts(ours, address, port)
        with ThreadPoolExecutor(len(ours)) as threads:
            asked = [
                threads.submit(server.join_transfer, start)
                for server, start in zip(ours, starts, strict=True)
            ]
        try:
            for each in asked:
                each.result()
        except CallError as error:
            self._faults[error.fault] += 1
            living = [s for s, each in zip(ours, asked, strict=True) if each.exception() is None]
            # The others wait for a rank that does not come, and join the smaller group instead.
            if living:
                self.form(living, must_form=must_form)
            return
        try:
            self._group = (
                VllmGroup(address=address, port=port, size=starts[0].size)
                if store is None
                else TransferGroup(
                    self._backend, store, rank=0, size=starts[0].size, address=address
                )
            )
        except EngineError:
            if must_form:
                raise
            self._faults[Fault.UNREACHABLE] += 1
            return
        self._members = {server.url: server for server in ours}

    def _starts(
        self, servers: Sequence[GroupServer], address: str, port: int
    ) -> list[TransferStart]:
        """Return what each is told: of two servers of 2 workers the second begins at rank 3."""
        with ThreadPoolExecutor(len(servers)) as threads:
            counted = [threads.submit(server.num_ranks) for server in servers]
        # A server that does not answer does not get to join either.
        ranks = [1 if each.exception() else each.result() for each in counted]
        return [
            TransferStart(
                transfer=self._transfer,
                backend=self._backend,
                address=address,
                port=port,
                rank=1 + sum(ranks[:number]),
                size=1 + sum(ranks),
            )
            for number in range(len(servers))
        ]

    def give(self, server: RolloutServer, part: WeightPart) -> None:
        """Give one server a part, through the group while it stands.

        Raises:
            CallError: when the server does not take it over HTTP either.
        """
        member = self._members.get(server.url)
        if member is None or not self.is_formed:
            server.put_weights(part)
            return
        try:
            member.announce(part, self._transfer)
            self._meet(member, part)
            member.await_part(part)
        except CallError as error:
            self._faults[error.fault] += 1
            self.leave()
            server.put_weights(part)

    def leave(self) -> None:
        """Close the group: some server takes no parts any more."""
        with self._turn:
            self._break()

    def close(self) -> None:
        """Close the group. Calling it twice is allowed."""
        self.leave()

    def _meet(self, server: GroupServer, part: WeightPart) -> None:
        """Wait until all servers expect the part, and until one thread has sent it to them."""
        with self._turn:
            self._arrived.add(server.url)
            is_last = self._arrived == self._members.keys()
            if is_last:
                self._arrived = set()
                # Another thread may leave at any time from here on.
                group = self._group
                self._is_sending = group is not None
            else:
                self._turn.wait_for(lambda: part.number in self._outcomes or not self.is_formed)
                return
        was_sent = False
        try:
            if group is not None:
                _send(group, part)
                was_sent = True
        except EngineError:
            pass  # Each server says whether it got the part.
        finally:
            with self._turn:
                self._is_sending = False
                self._outcomes[part.number] = was_sent
                self.num_sent += was_sent
                if not was_sent:
                    self._break()
                if group is not None and self._group is not group:
                    group.close()
                self._turn.notify_all()

    def _break(self) -> None:
        group, self._group = self._group, None
        # A thread that sends holds it, and its peers end its call if one of them is gone.
        if group is not None and not self._is_sending:
            group.close()
        self._turn.notify_all()


def _send(group: TransferGroup | VllmGroup, part: WeightPart) -> None:
    """Broadcast a part: its tensors, or its file in chunks, through one buffer."""
    if isinstance(group, VllmGroup):
        group.send(part.tensors.values())
        return
    buffer = np.empty(min(part.num_bytes, MAX_CHUNK_BYTES), dtype=np.uint8)
    for chunk in part.chunks(MAX_CHUNK_BYTES):
        size = 0
        for piece in chunk.pieces:
            buffer[size : size + piece.nbytes] = np.frombuffer(piece, dtype=np.uint8)
            size += piece.nbytes
        group.broadcast(buffer[:size])


def _address_for(servers: Sequence[RolloutServer]) -> str:
    """Return the address of this machine that all servers reach: loopback if all are here."""
    addresses = [own_address(_host(server.url)) for server in servers]
    reached = [a for a in addresses if not ipaddress.ip_address(a.split("%")[0]).is_loopback]
    return (reached or addresses)[0]


def _host(url: str) -> str:
    host = urlsplit(url).hostname
    assert host is not None, "the server has answered"
    return host
