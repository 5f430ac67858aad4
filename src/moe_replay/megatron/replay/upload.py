"""Routes from host to device, once a microbatch, in their narrow dtype; counts back to the host."""

from __future__ import annotations

import numpy as np
import torch

from moe_replay.routing import RouteSlice


class DeviceRoutes:
    """The routes of one microbatch where its routers run, uploaded once for all layers."""

    def __init__(self, routes: RouteSlice, device: torch.device) -> None:
        """Start the upload."""
        self.expert_ids = upload(routes.expert_ids, device)
        live = np.flatnonzero(~routes.valid)
        self.live_rows = upload(live, device) if len(live) else None


def upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return ``array`` on ``device``; from pinned memory and without waiting when that is a GPU."""
    host = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)


class Download:
    """A tensor on its way to the host: the copy starts at once, and `array` waits for it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._host = tensor
        if tensor.device.type == "cuda":
            self._host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def array(self) -> np.ndarray:
        """Return the values, once they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.numpy()
