"""Memory that the trainer gives back while an engine samples on its device, and takes back later.

The unit is a storage: its bytes are copied to host memory that is made once, and the storage is
resized to 0 and back. Parameters, their views and everything that points to them stay the objects
that they are. (Megatron's `MegatronOptimizer.offload_to_cpu` puts new tensors in their place, which
cuts a precision-aware optimizer off from the model that it updates.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.transformer_config import TransformerConfig

from moe_replay.errors import UnsupportedError, UpdateError
from moe_replay.recipe.sections.training import GivenBack

Part = Literal["gradients", "optimizer", "weights"]

PARTS: Mapping[GivenBack, tuple[Part, ...]] = {
    "auto": (),
    "none": (),
    "gradients": ("gradients",),
    "optimizer": ("gradients", "optimizer"),
    "weights": ("gradients", "optimizer", "weights"),
}
"""``megatron.offload_during_rollout`` -> the parts that are given back; ``auto`` is for a recipe
whose device is not known yet."""
BLOCK_BYTES = 256 * 2**20
"""Host memory is made in blocks of this size: torch rounds pinned memory up to powers of two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """One part of what a trainer holds on its device."""

    tensors: Callable[[], Iterable[torch.Tensor]]
    """Every tensor of it at present; those of other devices, and views, are allowed."""
    keeps_values: bool = True
    """Whether its values are needed again; otherwise it comes back as zeros."""


class DeviceMemory:
    """What one model of the trainer holds on a device, part by part.

    A part that is away must not be read: take it back first. Every method of the scorer and the
    actor does so, and so do their properties that lead to tensors.
    """

    def __init__(
        self,
        device: torch.device,
        holdings: Mapping[Part, Holding],
        *,
        gives_back: GivenBack,
        before: Callable[[], None] = lambda: None,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        """Give back the parts of ``gives_back`` when asked to.

        ``before`` drops what would keep device memory alive that is of no use afterwards.
        """
        self._device, self._holdings, self._before = device, holdings, before
        self._given = tuple(part for part in PARTS[gives_back] if part in holdings)
        self._hosts = {
            part: _HostCopy(device, block_bytes)
            for part in self._given
            if holdings[part].keeps_values
        }
        self._away: dict[Part, list[tuple[torch.UntypedStorage, int]]] = {}

    @property
    def is_away(self) -> bool:
        """Whether some part is given back at present."""
        return bool(self._away)

    def held_bytes(self) -> int:
        """Return the bytes that all parts together hold on the device at present."""
        return sum(
            storage.nbytes() for part in self._holdings for storage in self._storages_of(part)
        )

    def give_back(self, *, but: Collection[Part] = ()) -> None:
        """Free the device memory of every part that is given back at all, except ``but``.

        Raises:
            UpdateError: when the host has no memory for a copy; nothing is lost.
        """
        leaving = [part for part in self._given if part not in but and part not in self._away]
        if not leaving:
            return
        self._before()
        for part in leaving:
            storages = [(storage, storage.nbytes()) for storage in self._storages_of(part)]
            if part in self._hosts:
                self._hosts[part].keep([storage for storage, _ in storages])
            for storage, _ in storages:
                storage.resize_(0)
            self._away[part] = storages
        if self._device.type == "cuda":
            # An engine's own allocator, or another process, gets what torch no longer caches.
            torch.cuda.empty_cache()

    def take_back(self, *parts: Part) -> None:
        """Bring ``parts`` back to the device, those that are away."""
        for part in parts:
            if part not in self._away:
                continue
            storages = self._away[part]
            for storage, size in storages:
                storage.resize_(size)
            # No longer away, even if what follows is interrupted: its memory exists again.
            del self._away[part]
            if part in self._hosts:
                self._hosts[part].restore([storage for storage, _ in storages])
            else:
                for storage, _ in storages:
                    _bytes_of(storage).zero_()

    def _storages_of(self, part: Part) -> list[torch.UntypedStorage]:
        """Return the storages of a part on the device, each once, and in one part only.

        Float32 weights are their own main weights: the optimizer holds views of them, which belong
        to the weights, as gradients' views belong to the gradients.
        """
        found: dict[int, torch.UntypedStorage] = {}
        taken: set[int] = set()
        if part == "optimizer":
            for other in self._holdings:
                if other != part:
                    taken |= {s._cdata for s in _storages(self._holdings[other].tensors())}
        for storage in _storages(self._holdings[part].tensors()):
            is_here = storage.device.type == self._device.type and storage.nbytes()
            if is_here and storage._cdata not in taken:
                found[storage._cdata] = storage
        return list(found.values())


class _HostCopy:
    """Bytes of storages in host memory, which is made once and only ever grows."""

    def __init__(self, device: torch.device, block_bytes: int) -> None:
        self._is_pinned = device.type == "cuda"
        self._block_bytes = block_bytes
        self._blocks: list[torch.Tensor] = []

    def keep(self, storages: Sequence[torch.UntypedStorage]) -> None:
        """Copy the bytes of ``storages`` here; they are complete when this returns."""
        sizes = [storage.nbytes() for storage in storages]
        self._make_room(sum(sizes))
        for there, here in self._pairs(storages, sizes):
            here.copy_(there, non_blocking=True)
        if self._is_pinned:
            torch.cuda.synchronize()

    def restore(self, storages: Sequence[torch.UntypedStorage]) -> None:
        """Copy back what `keep` was given, into storages of the same sizes in the same order."""
        for there, here in self._pairs(storages, [storage.nbytes() for storage in storages]):
            there.copy_(here, non_blocking=True)

    def _make_room(self, needed: int) -> None:
        missing = needed - sum(len(block) for block in self._blocks)
        while missing > 0:
            size = min(self._block_bytes, 1 << (missing - 1).bit_length())
            try:
                block = torch.empty(size, dtype=torch.uint8, pin_memory=self._is_pinned)
            except RuntimeError as error:
                raise UpdateError(
                    f"the host has no {needed / 2**30:.1f} GiB for what the trainer gives back during rollouts "
                    f"({str(error).splitlines()[0]}); set megatron.offload_during_rollout = 'gradients', which needs none, "
                    "or 'none', or give the processes of this machine more memory"
                ) from error
            self._blocks.append(block)
            missing -= size

    def _pairs(
        self, storages: Sequence[torch.UntypedStorage], sizes: Sequence[int]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        blocks = [len(block) for block in self._blocks]
        for number, start, block, at, size in spans(sizes, blocks):
            there = _bytes_of(storages[number])[start : start + size]
            yield there, self._blocks[block][at : at + size]


def spans(sizes: Sequence[int], blocks: Sequence[int]) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield (item, start in it, block, start in it, length) of items laid end to end into blocks.

    Example: items of 5 and 6 bytes in blocks of 4.

        >>> list(spans([5, 6], [4, 4, 4]))
        [(0, 0, 0, 0, 4), (0, 4, 1, 0, 1), (1, 0, 1, 1, 3), (1, 3, 2, 0, 3)]
    """
    block = at = 0
    for item, size in enumerate(sizes):
        start = 0
        while start < size:
            if at == blocks[block]:
                block, at = block + 1, 0
            length = min(size - start, blocks[block] - at)
            yield item, start, block, at, length
            start, at = start + length, at + length


def weights_of(chunks: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield the weights of model chunks, and the buffers that Megatron's wrapper keeps them in."""
    for chunk in chunks:
        for buffer in _buffers(chunk):
            if buffer.param_data is not None:
                yield buffer.param_data
        yield from chunk.parameters()


def gradients_of(chunks: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield the gradient buffers of model chunks under Megatron's wrapper."""
    for chunk in chunks:
        for buffer in _buffers(chunk):
            if buffer.grad_data is not None:
                yield buffer.grad_data


def optimizer_state_of(optimizer: MegatronOptimizer) -> Iterator[torch.Tensor]:
    """Yield what an optimizer holds: main weights, moments, and views of the model's weights."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)
        # Megatron's optimizer on the CPU divides the parameters among several.
        for each in (inner, *getattr(inner, "sub_optimizers", ())) if inner is not None else ():
            for group in each.param_groups:
                yield from group["params"]
            for state in each.state.values():
                yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def check_movable(
    gives_back: GivenBack, config: TransformerConfig, wrapping: DistributedDataParallelConfig
) -> None:
    """Refuse to move memory whose address something else has kept.

    Raises:
        UnsupportedError: CUDA graphs replay kernels on the addresses that they were captured with,
            and NCCL's registered buffers are known to the network by theirs.
    """
    if not PARTS[gives_back]:
        return
    graphs = getattr(config, "cuda_graph_impl", "none")
    for option, is_on in (
        (f"cuda_graph_impl = {graphs!r}", graphs != "none"),
        ("nccl_ub = true", getattr(wrapping, "nccl_ub", False)),
    ):
        if is_on:
            raise UnsupportedError(
                f"megatron.offload_during_rollout = {gives_back!r} gives memory back and takes other memory for it, but "
                f"{option} keeps using the old addresses: set offload_during_rollout = 'none', or remove {option}"
            )


def drop_scratch_memory() -> None:
    """Let go of the tensors that Megatron keeps to spare allocations; it makes them again."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.get_global_memory_buffer().buffer.clear()


def _buffers(chunk: Any) -> Iterator[Any]:
    if isinstance(chunk, DistributedDataParallel):
        yield from (*chunk.buffers, *chunk.expert_parallel_buffers)


def _storages(tensors: Iterable[torch.Tensor]) -> Iterator[torch.UntypedStorage]:
    for tensor in tensors:
        # A quantized weight has no storage of its own: its bytes are those of a buffer.
        if type(tensor.data) is torch.Tensor:
            yield tensor.untyped_storage()


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
