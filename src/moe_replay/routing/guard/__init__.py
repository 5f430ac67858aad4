"""The guard: proves that replayed routes belong to the rows that they are replayed on, sample by sample.

In: live and replayed expert ids, as counts of shared slots. Out: a verdict for each sample, server, rank and layer.
"""

from moe_replay.routing.guard.counts import PLACES, OverlapCounts, count_overlaps

__all__ = ["PLACES", "OverlapCounts", "count_overlaps"]
