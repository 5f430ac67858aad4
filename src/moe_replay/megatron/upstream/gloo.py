"""Process groups over gloo that share a device, which torch gives to each group of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed import distributed_c10d, is_gloo_available


@contextmanager
def one_gloo_device() -> Iterator[None]:
    """Let all gloo groups that torch makes inside the scope share the device of the first.

    A device is a listening socket and a thread that wakes up a hundred times a second for as long
    as the group lives. The 21 groups of a process that is idle take 2.3 % of a core with a device
    each, and 0.2 % with one; Megatron makes about as many for any layout.
    """
    if not is_gloo_available():
        yield
        return
    # Any: torch's declarations lack what is given to a group here, and its name is no variable.
    torch_groups: Any = distributed_c10d
    stock: Any = torch_groups.ProcessGroupGloo
    kind: Any = type(stock)
    first: list[Any] = []

    class StillGloo(kind):
        # torch asks by this name whether groups are over gloo, also those made before.
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, stock)

    class SharingGroup(stock, metaclass=StillGloo):
        def __init__(self, store: Any, rank: int, size: int, timeout: Any) -> None:
            if not first:
                # torch's own choice of interfaces, which the environment may name.
                super().__init__(store, rank, size, timeout=timeout)
                first.append(self.options)
                return
            options = stock._Options()
            options._devices, options._threads = first[0]._devices, first[0]._threads
            options._timeout = timeout
            super().__init__(store, rank, size, options)

    torch_groups.ProcessGroupGloo = SharingGroup
    try:
        yield
    finally:
        torch_groups.ProcessGroupGloo = stock
