"""Replica: the ranks that hold one copy of the policy together, and what each of them routes.

The ranks of a replica train on the same samples. Each samples its own part of them, and gives every other rank just
what that rank needs.

In: this rank's routers. Out: Replica. Called by: grpo.run, grpo.sharing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from moe_replay.batch import RankPlace
from moe_replay.sync.messages import exchange_bytes, gather_bytes, gather_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One rank of a replica."""

    place: RankPlace
    """Which rows it holds."""
    layers: tuple[int, ...]
    """Global decoder indices of the layers whose routers it runs; empty on a stage of dense layers."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replica:
    """One copy of the policy, spread over tensor-, context- and pipeline-parallel ranks."""

    number: int
    """Data-parallel rank of this copy."""
    num_replicas: int
    """Copies."""
    peers: tuple[Peer, ...]
    """Its ranks, in the order of ``group``."""
    own: int
    """This rank's place among them."""
    computes_loss: bool
    """Whether this rank speaks for its rows in the loss: last pipeline stage, first tensor-parallel rank."""
    is_last_stage: bool
    """Whether this rank is on the last pipeline stage."""
    group: dist.ProcessGroup | None
    """Its ranks; None when this rank is the whole replica."""
    device: torch.device
    """Where messages must lie to be sent."""

    @classmethod
    def find(cls, layers: Sequence[int], *, place: RankPlace, device: torch.device) -> Replica:
        """Find out who shares a copy with this rank; every rank of the world calls this together."""
        number = parallel_state.get_data_parallel_rank()
        mine = {
            "replica": number,
            "layers": list(layers),
            "tp_size": place.tp_size,
            "tp_rank": place.tp_rank,
            "cp_size": place.cp_size,
            "cp_rank": place.cp_rank,
        }
        world = dist.group.WORLD
        assert world is not None
        everyone = gather_json(mine, world, device=device)
        members: dict[int, list[int]] = {}
        for rank, entry in enumerate(everyone):
            members.setdefault(entry.pop("replica"), []).append(rank)
        # Any: torch annotates the group as if it could be a number.
        groups: dict[int, Any] = {
            replica: dist.new_group(ranks) if len(ranks) > 1 else None
            for replica, ranks in sorted(members.items())
        }
        ranks = members[number]
        is_last_stage = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        peers = []
        for rank in ranks:
            entry = everyone[rank]
            peers.append(Peer(layers=tuple(entry.pop("layers")), place=RankPlace(**entry)))
        return cls(
            number=number,
            num_replicas=len(members),
            peers=tuple(peers),
            own=ranks.index(dist.get_rank()),
            computes_loss=place.tp_rank == 0 and is_last_stage,
            is_last_stage=is_last_stage,
            group=groups[number],
            device=device,
        )

    @property
    def size(self) -> int:
        """Number of its ranks."""
        return len(self.peers)

    @property
    def is_leader(self) -> bool:
        """Whether this rank speaks for the replica where one voice is wanted."""
        return self.own == 0

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that this rank routes."""
        return self.peers[self.own].layers

    def gather(self, payload: bytes) -> list[bytes]:
        """Return what every rank of the replica gave, in its order; collective over it."""
        if self.group is None:
            return [payload]
        return gather_bytes(payload, self.group, device=self.device)

    def exchange(self, payloads: Sequence[bytes]) -> list[bytes]:
        """Send ``payloads[i]`` to rank i of the replica and return what each sent here; collective over it."""
        if self.group is None:
            return list(payloads)
        return exchange_bytes(payloads, self.group, device=self.device)
