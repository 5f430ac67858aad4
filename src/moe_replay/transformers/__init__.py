"""Hugging Face models: record the routes that their routers choose, and replay routes in their place.

In: a transformers model. Out: `record_routes`, `replay_routes`, `find_routers`. Called by: rollout.embedded, and
other trainers.
"""

from moe_replay.transformers.record import (
    RouteRecorder,
    RouterSite,
    find_routers,
    record_routes,
)
from moe_replay.transformers.replay import replay_routes

__all__ = ["RouteRecorder", "RouterSite", "find_routers", "record_routes", "replay_routes"]
