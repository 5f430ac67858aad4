"""Replay and recording inside a model's routers."""

from moe_replay.megatron.replay.scope import RecordScope, ReplayScope, RouterScope

__all__ = ["RecordScope", "ReplayScope", "RouterScope"]
