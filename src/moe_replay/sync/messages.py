"""Small structured messages between ranks, as JSON in byte tensors: nothing is unpickled.

In: JSON-serialisable values. Out: the values of all ranks. Called by: grpo.loop.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist


def gather_json(value: Any, group: dist.ProcessGroup, *, device: torch.device) -> list[Any]:
    """Return every rank's ``value``, in rank order, on every rank.

    Floats survive exactly: JSON writes the shortest decimal that reads back as the same number.
    """
    if group.size() == 1:
        return [json.loads(json.dumps(value))]
    payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    size = torch.tensor([len(payload)], device=device)
    sizes = [torch.zeros_like(size) for _ in range(group.size())]
    dist.all_gather(sizes, size, group=group)
    longest = max(int(s) for s in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(payload)] = payload
    parts = [torch.zeros_like(padded) for _ in range(group.size())]
    dist.all_gather(parts, padded, group=group)
    return [
        json.loads(part[: int(n)].cpu().numpy().tobytes())
        for part, n in zip(parts, sizes, strict=True)
    ]
