"""Samples to microbatches: the token budget, packing, and the one gather vector of each rank.

In: rollouts with advantages. Out: microbatches.
"""

from moe_replay.batch.microbatch import Microbatch, build_microbatch
from moe_replay.batch.packing import plan_microbatches
from moe_replay.batch.place import RankPlace
from moe_replay.batch.samples import Sample

__all__ = [
    "Microbatch",
    "RankPlace",
    "Sample",
    "build_microbatch",
    "plan_microbatches",
]
