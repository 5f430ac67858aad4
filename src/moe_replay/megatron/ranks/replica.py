"""Replica: the ranks that hold one copy of the policy together, and what each of them routes.

The ranks of a replica train on the same samples. Each samples its own part of them, and gives every
other rank just what that rank needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state

from moe_replay.batch import RankPlace
from moe_replay.megatron.ranks.messages import HostGroup, all_ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One rank of a replica."""

    place: RankPlace
    """Which rows it holds."""
    layers: tuple[int, ...]
    """Global decoder indices of the layers that it routes; empty on a stage of dense layers."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replica:
    """One copy of the policy, spread over tensor-, context- and pipeline-parallel ranks."""

    number: int
    """Data-parallel rank of this copy."""
    num_replicas: int
    """Copies."""
    peers: tuple[Peer, ...]
    """Its ranks, in the order of ``ranks``."""
    own: int
    """This rank's place among them."""
    computes_loss: bool
    """Whether it reports its rows' loss: last pipeline stage, first tensor-parallel rank."""
    is_last_stage: bool
    """Whether this rank is on the last pipeline stage."""
    ranks: HostGroup
    """How its ranks talk."""
    siblings: HostGroup
    """The ranks of this one's place in every replica, in the order of their numbers."""

    @classmethod
    def find(cls, layers: Sequence[int], *, place: RankPlace) -> Replica:
        """Find the ranks that share a copy with this one; every rank of the world calls this."""
        number = parallel_state.get_data_parallel_rank()
        everyone = all_ranks().gather((number, Peer(place=place, layers=tuple(layers))))
        members: dict[int, list[int]] = {}
        for rank, (replica, _) in enumerate(everyone):
            members.setdefault(replica, []).append(rank)
        ranks = members[number]
        own = ranks.index(dist.get_rank())
        replicas = [members[replica] for replica in sorted(members)]
        places = [list(place) for place in zip(*replicas, strict=True)]
        # torch numbers the ranks of a group in the order of the world's.
        assert all(place == sorted(place) for place in places)
        is_last_stage = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        return cls(
            number=number,
            num_replicas=len(members),
            peers=tuple(everyone[rank][1] for rank in ranks),
            own=own,
            computes_loss=place.tp_rank == 0 and is_last_stage,
            is_last_stage=is_last_stage,
            ranks=HostGroup.own_part(replicas, name="replica"),
            siblings=HostGroup.own_part(places, name="ranks of place"),
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
