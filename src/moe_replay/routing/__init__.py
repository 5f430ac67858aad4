"""The core: traces, alignment and comparison in numpy, importable without torch.

In: arrays. Out: `RoutingTrace`, `RowIndex`, `Coverage`, `ReplayMode`, guard and reference router.
Called by: every other package, and other trainers.
"""

from moe_replay.routing.agreement import (
    Agreement,
    GuardEvidence,
    agreement_floor,
    measure_agreement,
)
from moe_replay.routing.compare import TraceComparison, compare_traces, flipped
from moe_replay.routing.diagnosis import Cause, Diagnosis, diagnose
from moe_replay.routing.group import PromptDifference, TraceGroup
from moe_replay.routing.guard import Guard
from moe_replay.routing.payload import (
    RoutedModel,
    trace_from_payload,
    trace_from_split_payload,
    unrouted_trace,
)
from moe_replay.routing.replay import Coverage, LiveReason, ReplayMode
from moe_replay.routing.rows import RowIndex
from moe_replay.routing.stitch import (
    EngineCall,
    RowKind,
    StitchedRollout,
    merge_partial,
    stitch_turns,
)
from moe_replay.routing.trace import Origin, PolicySpan, RoutingTrace, expert_dtype

__all__ = [
    "Agreement",
    "Cause",
    "Coverage",
    "Diagnosis",
    "EngineCall",
    "Guard",
    "GuardEvidence",
    "LiveReason",
    "Origin",
    "PolicySpan",
    "PromptDifference",
    "ReplayMode",
    "RoutedModel",
    "RoutingTrace",
    "RowIndex",
    "RowKind",
    "StitchedRollout",
    "TraceComparison",
    "TraceGroup",
    "agreement_floor",
    "compare_traces",
    "diagnose",
    "expert_dtype",
    "flipped",
    "measure_agreement",
    "merge_partial",
    "stitch_turns",
    "trace_from_payload",
    "trace_from_split_payload",
    "unrouted_trace",
]
