"""What torch's allocator hands out while something runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._C._profiler import _EventType


def peak_bytes(run: Callable[[], Any]) -> int:
    """Return the highest sum of what was handed out and not given back.

    What was there before does not count, even if it is given back meanwhile.
    """
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        kept = run()
    del kept
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    found: list[tuple[int, int, int]] = []
    events: list[Any] = list(profile.profiler.kineto_results.experimental_event_tree())
    for event in events:
        events += event.children
        if event.tag == _EventType.Allocation:
            fields = event.extra_fields
            found.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    # Sends between stages leave a tree as deep as it has events. Freed from the root on, with every
    # event held here, none is freed inside another: that would overflow the stack.
    profile.profiler.kineto_results = None
    event = None
    for index in range(len(events)):
        events[index] = None
    sizes: dict[int, int] = {}
    held = peak = 0
    for _, address, size in sorted(found, key=lambda event: event[0]):
        if size > 0:
            sizes[address] = size
            held += size
            peak = max(peak, held)
        else:
            held -= sizes.pop(address, 0)
    return peak
