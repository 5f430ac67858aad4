"""Hugging Face models: record the routes that their routers choose, and replay given ones.

In: a transformers model. Out: `record_routes`, `replay_routes`, `replay_traces`, `find_routers`,
`routed_model`.
"""

from moe_replay.transformers.model_config import routed_model
from moe_replay.transformers.padded import place_traces, replay_traces
from moe_replay.transformers.record import (
    RouteRecorder,
    RouterSite,
    find_routers,
    record_routes,
)
from moe_replay.transformers.replay import replay_routes

__all__ = [
    "RouteRecorder",
    "RouterSite",
    "find_routers",
    "place_traces",
    "record_routes",
    "replay_routes",
    "replay_traces",
    "routed_model",
]
