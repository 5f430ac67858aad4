"""Adapters: all adapters of a model on this rank: switched off, merged, kept, exported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from moe_replay.megatron.lora.layers import LinearAdapter, Switch
from moe_replay.megatron.ranks.messages import HostGroup, all_ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """One matrix of an adapter as this rank holds it."""

    name: str
    """In the checkpoint's words, such as
    ``model.layers.3.mlp.experts.7.up_proj.lora_A.weight``."""
    part: torch.nn.Parameter
    """What this rank holds of it."""
    cut_dim: int | None
    """Dim that tensor parallelism cuts; None where each rank has all of it."""
    is_expert: bool
    """Whether it belongs to a routed expert."""

    @property
    def sharded(self) -> ShardedTensor:
        """What Megatron's checkpoints know it by, in any layout."""
        tensor = parallel_state.get_tensor_model_parallel_group()
        offsets, first = [], tensor.rank()
        if self.cut_dim is not None:
            offsets, first = [(self.cut_dim, tensor.rank(), tensor.size())], 0
        if self.is_expert:
            replica = (0, 0, parallel_state.get_expert_data_parallel_rank())
        else:
            replica = (0, first, parallel_state.get_data_parallel_rank(with_context_parallel=True))
        return ShardedTensor.from_rank_offsets(self.name, self.part, *offsets, replica_id=replica)

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Shape of the whole matrix."""
        size = list(self.part.shape)
        if self.cut_dim is not None:
            size[self.cut_dim] *= parallel_state.get_tensor_model_parallel_world_size()
        return tuple(size)

    def cut(self, whole: Tensor) -> Tensor:
        """Return this rank's part of a whole matrix."""
        if self.cut_dim is None:
            return whole
        group = parallel_state.get_tensor_model_parallel_group()
        return whole.chunk(group.size(), dim=self.cut_dim)[group.rank()]

    def whole(self) -> Tensor:
        """Return the whole matrix; collective over the tensor-parallel ranks where it is cut."""
        part = self.part.detach()
        group = parallel_state.get_tensor_model_parallel_group()
        if self.cut_dim is None or group.size() == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(group.size())]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts, dim=self.cut_dim)


class Changes:
    """How many numbers merging changes, in the format in which an engine has them."""

    def __init__(self, dtype: torch.dtype) -> None:
        """Compare numbers in ``dtype``, unless their own is lower."""
        self._dtype = dtype
        self._changed = self._seen = 0.0

    def add(self, base: Tensor, merged: Tensor, *, replicas: int) -> None:
        """Count a part of a weight that ``replicas`` ranks hold and count alike."""
        if base.element_size() > self._dtype.itemsize:
            base, merged = base.to(self._dtype), merged.to(self._dtype)
        self._changed += float((merged != base).sum()) / replicas
        self._seen += base.numel() / replicas

    def frac(self, ranks: HostGroup) -> float:
        """Return the share of all numbers beside an adapter; collective."""
        parts = ranks.gather((self._changed, self._seen))
        changed, seen = (sum(values) for values in zip(*parts, strict=True))
        return changed / seen if seen else 0.0


class Adapters:
    """The adapters of this rank's model chunks."""

    def __init__(
        self,
        layers: Mapping[torch.nn.Parameter, LinearAdapter],
        matrices: Sequence[Matrix],
        switch: Switch,
    ) -> None:
        """Take the adapters of linear layers by the weight of each; collective."""
        # By identity: tensors compare by value.
        self._layers = {id(weight): (weight, adapter) for weight, adapter in layers.items()}
        self._switch = switch
        self._changes: Changes | None = None
        self.matrices = list(matrices)
        """All matrices that this rank holds a part of."""
        everywhere = all_ranks().gather(
            {each.name: (each.whole_shape, each.part.dtype) for each in matrices}
        )
        known = {name: size for held in everywhere for name, size in held.items()}
        holder = {
            name: rank for rank in reversed(range(len(everywhere))) for name in everywhere[rank]
        }
        self._plan = [(name, holder[name], *known[name]) for name in sorted(known)]
        """Name, first holder, shape and dtype of every matrix of the model."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every matrix of the model, by name."""
        return {name: shape for name, _, shape, _ in self._plan}

    @contextmanager
    def off(self) -> Iterator[None]:
        """Let the model be the one that the adapters started beside, for the time of a block."""
        before, self._switch.is_on = self._switch.is_on, False
        try:
            yield
        finally:
            self._switch.is_on = before

    @contextmanager
    def counting(self, dtype: torch.dtype) -> Iterator[Changes]:
        """Count what `merged` changes inside a block, for an engine that holds ``dtype``."""
        self._changes = Changes(dtype)
        try:
            yield self._changes
        finally:
            self._changes = None

    def merged(self, weight: Tensor) -> Tensor:
        """Return a weight with what its adapter adds, which is computed in float32 and cast once.

        The weight itself is only read, so that merging leaves no rounding behind.
        """
        base = weight.detach()
        if id(weight) not in self._layers:
            return base
        _, adapter = self._layers[id(weight)]
        with torch.no_grad():
            merged = (base.float() + adapter.weight_change()).to(base.dtype)
            if self._changes is not None:
                replicas = (
                    parallel_state.get_expert_data_parallel_world_size()
                    if adapter.is_expert
                    else parallel_state.get_data_parallel_world_size(with_context_parallel=True)
                )
                if adapter.cut == "none" and not adapter.is_expert:
                    replicas *= parallel_state.get_tensor_model_parallel_world_size()
                self._changes.add(base, merged, replicas=replicas)
        return merged

    def sharded_state(self) -> dict[str, ShardedTensor]:
        """Return what a checkpoint keeps of this rank: adapters, and nothing of the model."""
        return {each.name: each.sharded for each in self.matrices}

    def take(self, state: Mapping[str, Any]) -> None:
        """Take this rank's parts from a loaded `sharded_state`."""
        with torch.no_grad():
            for each in self.matrices:
                each.part.copy_(state[each.name])

    def take_whole(self, tensors: Mapping[str, Tensor]) -> None:
        """Take this rank's parts of whole matrices by name."""
        with torch.no_grad():
            for each in self.matrices:
                each.part.copy_(each.cut(tensors[each.name]))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every matrix of the model by name, on every rank; collective, to the end."""
        held = {each.name: each for each in self.matrices}
        device = self.matrices[0].part.device
        for name, holder, size, dtype in self._plan:
            with torch.no_grad():
                own = held.get(name)
                whole = own.whole() if own is not None else None
                if all_ranks().size > 1:
                    if whole is None:
                        whole = torch.empty(size, dtype=dtype, device=device)
                    whole = whole.contiguous()
                    dist.broadcast(whole, src=holder)
            assert whole is not None
            yield name, whole.clone()
