"""The core: traces, alignment and comparison in numpy, importable without torch.

In: arrays. Out: `RoutingTrace`, `RowIndex`, `Coverage`, `ReplayMode`, guard and reference router.
Called by: every other package, and other trainers.
"""

from moe_replay.routing.replay import Coverage, LiveReason, ReplayMode
from moe_replay.routing.rows import RowIndex
from moe_replay.routing.trace import Origin, PolicySpan, RoutingTrace, expert_dtype

__all__ = [
    "Coverage",
    "LiveReason",
    "Origin",
    "PolicySpan",
    "ReplayMode",
    "RoutingTrace",
    "RowIndex",
    "expert_dtype",
]
