"""Hugging Face models: record the routes that their routers choose, and replay given ones.

In: a transformers model. Out: `record_routes`, `record_generation`, `replay_routes`,
`replay_traces`, `find_routers`, `routed_model`, `weigh_experts`.
"""

from moe_replay.transformers.generation import Generated, GenerationRecorder, record_generation
from moe_replay.transformers.model_config import routed_model
from moe_replay.transformers.padded import place_traces, replay_traces
from moe_replay.transformers.record import RouteRecorder, record_routes
from moe_replay.transformers.replay import replay_routes
from moe_replay.transformers.routers.sites import RouterSite, find_routers
from moe_replay.transformers.routers.weighing import weigh_experts

__all__ = [
    "Generated",
    "GenerationRecorder",
    "RouteRecorder",
    "RouterSite",
    "find_routers",
    "place_traces",
    "record_generation",
    "record_routes",
    "replay_routes",
    "replay_traces",
    "routed_model",
    "weigh_experts",
]
