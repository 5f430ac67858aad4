"""A process group of one trainer and its rollout servers, through which it sends bytes to all once.

It stands beside torch.distributed's own groups, of which the trainer has some and a server none.
Over gloo the bytes go from host to host; over NCCL through a GPU of each side.

In: an address, a rank, buffers. Out: the sender's bytes in the buffers of all.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import UInt8

from moe_replay.errors import EngineError, RecipeError

Backend = Literal["gloo", "nccl"]
STEP_LIMIT = timedelta(seconds=120)
"""Longest wait for the others to join, or in one broadcast of a chunk."""


class TransferGroup:
    """The group as one of its members holds it; a rank's calls come from one thread at a time.

    Rank 0 sends, and is made from the store that `open_store` returns; the others connect to it.

    Raises:
        EngineError: when the others do not come.
    """

    def __init__(
        self, backend: Backend, store: dist.TCPStore, *, rank: int, size: int, address: str
    ) -> None:
        self._device = torch.device("cpu")
        if backend == "nccl":
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._rank = rank
        prefixed = dist.PrefixStore("moe-replay push", store)
        try:
            self._group: Any = (
                _nccl_group(prefixed, rank, size)
                if backend == "nccl"
                else _gloo_group(prefixed, rank, size, address)
            )
        except RuntimeError as error:
            raise EngineError(
                f"rank {rank} of {size} found no group of trainer and servers over {backend}: {error}"
            ) from error

    def broadcast(self, buffer: UInt8[np.ndarray, " bytes"]) -> None:
        """Send rank 0's bytes, or overwrite the buffer with them.

        Raises:
            EngineError: when another rank is gone or silent; the group is of no use then.
        """
        if self._group is None:
            raise EngineError("the group of trainer and servers was closed")
        on_host = torch.from_numpy(buffer)
        tensor = on_host.to(self._device)
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        try:
            self._group.broadcast([tensor], options).wait(STEP_LIMIT)
            if self._rank and tensor is not on_host:
                on_host.copy_(tensor)
        except RuntimeError as error:
            raise EngineError(
                f"rank {self._rank} lost the group of trainer and servers: {str(error).splitlines()[0]}"
            ) from error

    def close(self) -> None:
        """Leave: ranks that wait for this one fail at once. Calling it twice is allowed."""
        group, self._group = self._group, None
        if group is not None and self._device.type == "cuda":
            group.abort()


def check_backend(backend: Backend) -> None:
    """Raise `RecipeError` when this process has no such transport."""
    if backend == "gloo":
        return
    if not dist.is_nccl_available() or not torch.cuda.is_available():
        why = (
            "torch was built without NCCL" if not dist.is_nccl_available() else "no GPU is visible"
        )
        raise RecipeError(
            f"weights cannot be sent over NCCL from or to this process: {why}; set "
            "rollout.weight_transfer to 'gloo', or to 'auto'"
        )


def open_store(address: str) -> dist.TCPStore:
    """Return what the group meets through, on a free port of one address of this machine.

    Any process that reaches the address may join, so it is one address and not all of them, which
    is torch's own choice.
    """
    family = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0][0]
    listening = socket.create_server((address, 0), family=family)
    return dist.TCPStore(
        address,
        listening.getsockname()[1],
        None,
        True,
        wait_for_workers=False,
        timeout=STEP_LIMIT,
        # The store closes it.
        master_listen_fd=listening.detach(),
    )


def join_store(address: str, port: int) -> dist.TCPStore:
    """Connect to the sender's store.

    Raises:
        EngineError: when nobody is there.
    """
    try:
        return dist.TCPStore(address, port, None, False, timeout=STEP_LIMIT)
    except RuntimeError as error:
        raise EngineError(
            f"no trainer is found at {address}:{port}: {str(error).splitlines()[0]}"
        ) from error


def own_address(towards: str) -> str:
    """Return the address of this machine from which it reaches another one."""
    family, _, _, _, target = socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        # Nothing is sent: the kernel only chooses a route.
        probe.connect(target)
        return probe.getsockname()[0]


def _gloo_group(store: dist.Store, rank: int, size: int, address: str) -> Any:
    gloo: Any = dist.ProcessGroupGloo  # torch declares a part of it.
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=address)]
    options._timeout, options._threads = STEP_LIMIT, 1
    return gloo(store, rank, size, options)


def _nccl_group(store: dist.Store, rank: int, size: int) -> Any:
    nccl: Any = dist.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = STEP_LIMIT
    return nccl(store, rank, size, options)
