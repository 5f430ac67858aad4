"""Replay and recording inside a model's routers.

In: routers by global layer, routes by microbatch key. Out: forced or recorded experts; overlap
counts.
"""

from moe_replay.megatron.replay.scope import RecordScope, ReplayScope, RouterScope

__all__ = ["RecordScope", "ReplayScope", "RouterScope"]
