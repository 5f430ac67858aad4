"""Routes from the host to the device: once for each microbatch, in their own narrow dtype.

In: RouteSlice. Out: tensors on the device. Called by: megatron.replay.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int64

from moe_replay.routing import RouteSlice


class DeviceRoutes:
    """The routes of one microbatch where its routers run, uploaded once for all layers."""

    def __init__(
        self, routes: RouteSlice, watched: Int64[np.ndarray, " watched"], device: torch.device
    ) -> None:
        """Start the upload; ``watched`` are valid rows whose live experts are wanted too."""
        self.expert_ids = upload(routes.expert_ids, device)
        live = np.flatnonzero(~routes.valid)
        self.live_rows = upload(live, device) if len(live) else None
        self.watched_rows = upload(watched, device) if len(watched) else None
        self.asked_rows = None
        if len(live) + len(watched):
            self.asked_rows = upload(np.concatenate([live, watched]), device)
        self.num_live = len(live)


def upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return ``array`` on ``device``; from pinned memory and without waiting when that is a GPU."""
    host = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)
