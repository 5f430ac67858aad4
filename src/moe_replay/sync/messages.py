"""Small structured messages between ranks, as JSON or plain bytes in byte tensors: nothing is unpickled.

In: JSON-serialisable values, bytes. Out: those of the other ranks. Called by: grpo.loop, megatron.replica.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


def gather_json(value: Any, group: dist.ProcessGroup, *, device: torch.device) -> list[Any]:
    """Return every rank's ``value``, in rank order, on every rank.

    Floats survive exactly: JSON writes the shortest decimal that reads back as the same number.
    """
    payload = json.dumps(value).encode()
    return [json.loads(part) for part in gather_bytes(payload, group, device=device)]


def gather_bytes(payload: bytes, group: dist.ProcessGroup, *, device: torch.device) -> list[bytes]:
    """Return every rank's ``payload``, in rank order, on every rank; they may differ in length."""
    if group.size() == 1:
        return [payload]
    sizes = _gather_sizes([len(payload)], group, device)
    longest = max(int(size) for (size,) in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(payload)] = _tensor(payload, device)
    parts = [torch.zeros_like(padded) for _ in range(group.size())]
    dist.all_gather(parts, padded, group=group)
    return [_bytes(part[:size]) for part, (size,) in zip(parts, sizes, strict=True)]


def exchange_bytes(
    payloads: Sequence[bytes], group: dist.ProcessGroup, *, device: torch.device
) -> list[bytes]:
    """Send ``payloads[i]`` to rank i of ``group``; return what each rank sent to this one, in rank order."""
    assert len(payloads) == group.size(), f"{len(payloads)} payloads for {group.size()} ranks"
    if group.size() == 1:
        return list(payloads)
    outgoing = [len(payload) for payload in payloads]
    table = _gather_sizes(outgoing, group, device)
    incoming = [sizes[group.rank()] for sizes in table]
    received = torch.zeros(sum(incoming), dtype=torch.uint8, device=device)
    dist.all_to_all_single(
        received, _tensor(b"".join(payloads), device), incoming, outgoing, group=group
    )
    return [_bytes(part) for part in received.split(incoming)]


def first_text(
    text: str | None, group: dist.ProcessGroup, *, device: torch.device
) -> tuple[int, str] | None:
    """Return the lowest rank whose ``text`` is not None and its text, on every rank; None where all are None.

    Ranks that tell one another what went wrong before they go on stop together, instead of waiting for the one that
    failed.
    """
    for rank, given in enumerate(gather_json(text, group, device=device)):
        if given is not None:
            return rank, given
    return None


def _gather_sizes(
    sizes: Sequence[int], group: dist.ProcessGroup, device: torch.device
) -> list[list[int]]:
    mine = torch.tensor(sizes, dtype=torch.int64, device=device)
    everyone = [torch.zeros_like(mine) for _ in range(group.size())]
    dist.all_gather(everyone, mine, group=group)
    return [part.tolist() for part in everyone]


def _tensor(payload: bytes, device: torch.device) -> torch.Tensor:
    if not payload:
        return torch.zeros(0, dtype=torch.uint8, device=device)
    return torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(device)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()
