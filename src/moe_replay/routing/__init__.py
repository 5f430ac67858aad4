"""The core: traces, alignment and comparison in numpy, importable without torch."""

from moe_replay.routing.compare import TraceComparison, compare_traces, flipped
from moe_replay.routing.form import RouteForm, expert_dtype
from moe_replay.routing.format.codec import (
    decode_trace,
    decode_traces,
    encode_trace,
    encode_traces,
    from_text,
    to_text,
)
from moe_replay.routing.format.frame import Encoding, TraceHeader
from moe_replay.routing.format.trace_file import TraceFile, write_trace_file
from moe_replay.routing.guard.check import RouteReport, check_routes
from moe_replay.routing.guard.decision import Guard
from moe_replay.routing.guard.verdict import Finding, Owner
from moe_replay.routing.layer_order import LayerOrder
from moe_replay.routing.origin import Origin, PolicySpan
from moe_replay.routing.payload import (
    RoutedModel,
    trace_from_payload,
    trace_from_split_payload,
    unrouted_trace,
)
from moe_replay.routing.replay import Coverage, LiveReason, Passes, ReplayMode, Routing
from moe_replay.routing.rows import RowIndex
from moe_replay.routing.slices import RouteSlice, slice_routes
from moe_replay.routing.stitch import (
    EngineCall,
    RowKind,
    StitchedRollout,
    merge_partial,
    stitch_turns,
)
from moe_replay.routing.trace import RoutingTrace

__all__ = [
    "Coverage",
    "Encoding",
    "EngineCall",
    "Finding",
    "Guard",
    "LayerOrder",
    "LiveReason",
    "Origin",
    "Owner",
    "Passes",
    "PolicySpan",
    "ReplayMode",
    "RouteForm",
    "RouteReport",
    "RouteSlice",
    "RoutedModel",
    "Routing",
    "RoutingTrace",
    "RowIndex",
    "RowKind",
    "StitchedRollout",
    "TraceComparison",
    "TraceFile",
    "TraceHeader",
    "check_routes",
    "compare_traces",
    "decode_trace",
    "decode_traces",
    "encode_trace",
    "encode_traces",
    "expert_dtype",
    "flipped",
    "from_text",
    "merge_partial",
    "slice_routes",
    "stitch_turns",
    "to_text",
    "trace_from_payload",
    "trace_from_split_payload",
    "unrouted_trace",
    "write_trace_file",
]
