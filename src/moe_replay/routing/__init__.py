"""The core: traces, alignment and comparison in numpy, importable without torch.

The package itself loads nothing, numpy included: a name is imported when it is first used.

In: arrays. Out: `RoutingTrace`, `RowIndex`, `Coverage`, `ReplayMode`, guard, codec and reference router.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_replay.routing.compare import TraceComparison, compare_traces, flipped
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
    from moe_replay.routing.trace import Origin, PolicySpan, RoutingTrace, expert_dtype

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

_NAMES_IN = {
    "format.codec": "decode_trace decode_traces encode_trace encode_traces from_text to_text",
    "compare": "TraceComparison compare_traces flipped",
    "format.frame": "Encoding TraceHeader",
    "guard.check": "RouteReport check_routes",
    "guard.decision": "Guard",
    "guard.verdict": "Finding Owner",
    "layer_order": "LayerOrder",
    "payload": "RoutedModel trace_from_payload trace_from_split_payload unrouted_trace",
    "replay": "Coverage LiveReason Passes ReplayMode Routing",
    "rows": "RowIndex",
    "slices": "RouteSlice slice_routes",
    "stitch": "EngineCall RowKind StitchedRollout merge_partial stitch_turns",
    "trace": "Origin PolicySpan RoutingTrace expert_dtype",
    "format.trace_file": "TraceFile write_trace_file",
}
_MODULE_OF = {name: module for module, names in _NAMES_IN.items() for name in names.split()}


def __getattr__(name: str) -> object:
    """Import an exported name on its first use."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the exported names, imported or not."""
    return sorted({*globals(), *__all__})
