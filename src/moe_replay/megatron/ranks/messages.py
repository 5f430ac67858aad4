"""How the ranks of one job talk, host to host, beside the collectives of their devices.

Objects travel through torch's object collectives over gloo, which pickles: ranks of one job run the
same program and trust each other. What comes from outside the job never takes this way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import lru_cache
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import UInt8
from torch.distributed.distributed_c10d import _set_pg_timeout

from moe_replay import errors

T = TypeVar("T")
WAIT_LIMIT = timedelta(hours=24)
"""How long a rank waits in a message unless a recipe says otherwise (``run.rank_timeout``): another
may sample for hours when this one has finished.

A rank that ended is noticed at once, by its closed connection; the limit only ends waiting for one
that hangs.
"""
PIECE_BYTES = 64 * 2**20
"""What a rank receives at most in one piece of a long message, unless one item is larger."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HostGroup:
    """Some ranks of the job. Every method is collective over them."""

    group: dist.ProcessGroup | None
    """A gloo group; None where this rank is alone."""
    name: str
    """What they are, such as ``replica 3``; for messages."""

    @classmethod
    def own_part(cls, parts: Sequence[Sequence[int]], *, name: str) -> HostGroup:
        """Make a group of each of ``parts``, which divide the world's ranks; return this rank's.

        Every rank of the world calls this with the same parts. The index of the part follows
        ``name``.
        """
        if len(parts) == 1:
            return replace(all_ranks(), name=f"{name} 0")
        own = next(number for number, ranks in enumerate(parts) if dist.get_rank() in ranks)
        # torch numbers groups as they are made, and ranks of a group must know it by one number.
        limit = all_ranks().wait_limit
        groups = [
            dist.new_group(list(ranks), timeout=limit, backend="gloo") if len(ranks) > 1 else None
            for ranks in parts
        ]
        group = groups[own]
        assert group is None or isinstance(group, dist.ProcessGroup)
        return cls(group=group, name=f"{name} {own}")

    @property
    def size(self) -> int:
        """Number of ranks."""
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        """Index of this rank among them."""
        return 0 if self.group is None else self.group.rank()

    @property
    def wait_limit(self) -> timedelta:
        """How long a rank waits for the others in each of these messages."""
        if self.group is None:
            return WAIT_LIMIT
        return self.group._get_backend(torch.device("cpu")).options._timeout

    def barrier(self) -> None:
        """Wait until every rank is here; the device's own barrier gives up after ten minutes."""
        if self.size > 1:
            with self._waiting():
                dist.barrier(group=self.group)

    def gather(self, value: T) -> list[T]:
        """Return every rank's ``value``, in rank order, on every rank.

        The value is any plain object: numbers, texts, bytes, numpy arrays, and lists, dicts and
        dataclasses of them.
        """
        if self.size == 1:
            return [value]
        everyone: list[Any] = [None] * self.size
        with self._waiting():
            dist.all_gather_object(everyone, value, group=self.group)
        return everyone

    def gather_items(self, items: Sequence[T], num_bytes: Callable[[T], int]) -> list[list[T]]:
        """Return every rank's ``items``, on every rank, sent in pieces of bounded size.

        torch pads what each rank sends to the longest, so one long message takes ranks x longest on
        each of them: 64 ranks with 16 MB each take 1 GB at once in one piece, and 64 MiB here.
        """
        return self._in_pieces(items, num_bytes, self.gather)

    def gather_items_to_first(
        self, items: Sequence[T], num_bytes: Callable[[T], int]
    ) -> list[list[T]]:
        """Return every rank's ``items`` on the first rank alone; see `gather_items`."""

        def gather(piece: list[T]) -> list[list[T]]:
            if self.size == 1:
                return [piece]
            received: list[Any] | None = [None] * self.size if self.rank == 0 else None
            with self._waiting():
                dist.gather_object(piece, received, group=self.group, group_dst=0)
            return received or []

        return self._in_pieces(items, num_bytes, gather)

    def _in_pieces(
        self,
        items: Sequence[T],
        num_bytes: Callable[[T], int],
        gather: Callable[[list[T]], list[list[T]]],
    ) -> list[list[T]]:
        # So that the pieces of all ranks together stay below it, if possible.
        pieces = list(in_pieces(items, num_bytes, PIECE_BYTES // self.size))
        rounds = max(self.gather(len(pieces)))
        parts = [gather(pieces[n] if n < len(pieces) else []) for n in range(rounds)]
        if not parts:
            return [[] for _ in range(self.size)]
        return [list(chain.from_iterable(of_rank)) for of_rank in zip(*parts, strict=True)]

    def exchange(
        self, outgoing: Sequence[UInt8[np.ndarray, " _"]], incoming: Sequence[int]
    ) -> list[UInt8[np.ndarray, " _"]]:
        """Send ``outgoing[i]`` to rank i; return the ``incoming[i]`` bytes that it sends here."""
        assert len(outgoing) == len(incoming) == self.size
        if self.group is None:
            return list(outgoing)
        received = np.empty(sum(incoming), dtype=np.uint8)
        with self._waiting():
            dist.all_to_all_single(
                torch.from_numpy(received),
                torch.from_numpy(np.concatenate(outgoing)),
                list(incoming),
                [len(part) for part in outgoing],
                group=self.group,
            )
        return np.split(received, np.cumsum(incoming)[:-1])

    def first(self, text: str | None) -> tuple[int, str] | None:
        """Return the lowest rank with a ``text`` and that text, on every rank; None without any.

        Ranks that share what went wrong before they go on stop together, instead of waiting for the
        one that failed.
        """
        for rank, given in enumerate(self.gather(text)):
            if given is not None:
                return rank, given
        return None

    def raise_together(self, failure: Exception | None) -> None:
        """Raise ``failure``, or one of its kind where another rank has failed.

        A rank that raised alone would leave the others waiting in their next collective.
        """
        raise_first(failure, self.gather(as_text(failure)))

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Explain what torch reports when a rank is gone or silent."""
        try:
            yield
        except RuntimeError as error:
            is_silent = "timed out" in str(error).lower()
            happened = (
                f"one of them was silent for {self.wait_limit}; it hangs, or this job needs a longer run.rank_timeout"
                if is_silent
                else "one of them has ended; its own output says why"
            )
            raise errors.RankError(
                f"rank {self.rank} of {self.size} ({self.name}) lost the others: {happened}. Start the same command again "
                f"to go on after the last checkpoint. (torch: {str(error).splitlines()[0]})"
            ) from error


def in_pieces(items: Iterable[T], num_bytes: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Yield consecutive items of at most ``limit`` bytes together, or one that is larger alone.

    Items of 3, 4, 5 and 9 bytes and a limit of 8 make the pieces (3, 4), (5) and (9).
    """
    piece: list[T] = []
    held = 0
    for item in items:
        size = num_bytes(item)
        if piece and held + size > limit:
            yield piece
            piece, held = [], 0
        piece.append(item)
        held += size
    if piece:
        yield piece


def all_ranks() -> HostGroup:
    """Return all ranks of the job; this rank alone where torch.distributed is not in use.

    The first call is collective, and `moe_replay.megatron.layout.initialize` makes it.
    """
    world = dist.group.WORLD
    if world is not None and dist.get_backend(world) != "gloo":
        world = _beside(world)
    return HostGroup(group=world, name="all ranks")


def wait_at_most(limit: timedelta) -> None:
    """Let ranks wait for each other that long in messages of all of them, and of later groups."""
    group = all_ranks().group
    if group is not None:
        _set_pg_timeout(limit, group)


def raise_first(failure: Exception | None, failures: Sequence[tuple[str, str] | None]) -> None:
    """Raise this rank's ``failure``, or one of the kind of the first of all ranks' ``failures``."""
    if failure is not None:
        raise failure
    for rank, failed in enumerate(failures):
        if failed is not None:
            name, text = failed
            kind = getattr(errors, name, None)
            if isinstance(kind, type) and issubclass(kind, errors.MoeReplayError):
                raise kind(f"on rank {rank}: {text}")
            raise errors.MoeReplayError(f"on rank {rank}: {name}: {text}")


def as_text(failure: Exception | None) -> tuple[str, str] | None:
    """Return kind and message of a failure, for `raise_first` on other ranks."""
    return None if failure is None else (type(failure).__name__, str(failure))


def forget_groups() -> None:
    """Let go of a group of all ranks, before torch.distributed is shut down."""
    _beside.cache_clear()


@lru_cache(maxsize=1)
def _beside(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """Make a gloo group beside the device's, whose ten minutes are too short for a rollout."""
    assert world is dist.group.WORLD
    group = dist.new_group(timeout=WAIT_LIMIT, backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group
