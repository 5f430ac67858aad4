"""Streams that all ranks gather together, and some of them send or write on: none runs ahead."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moe_replay.megatron.ranks.messages import HostGroup

PACE_BYTES = 256 * 2**20


def in_step(
    weights: Iterator[tuple[str, torch.Tensor]], ranks: HostGroup, *, every_bytes: int = PACE_BYTES
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield ``weights``, which all ranks iterate to their end, and meet every ``every_bytes``.

    A rank that writes them to a slow disk or sends them to a server would otherwise be waited for
    in the device collective of the next tensor, which gives up after ten minutes. Here the others
    wait between hosts.
    """
    passed = 0
    for name, tensor in weights:
        passed += tensor.nbytes
        yield name, tensor
        if passed >= every_bytes:
            passed = 0
            ranks.barrier()
