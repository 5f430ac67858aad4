"""The guard: proves that replayed routes belong to the rows that they are replayed on, sample by sample.

In: live and replayed expert ids, as counts of shared slots. Out: a verdict for each sample, server, rank and layer.
"""

from moe_replay.routing.guard.baseline import Baseline
from moe_replay.routing.guard.check import RouteReport, check_routes
from moe_replay.routing.guard.counts import PLACES, OverlapCounts, count_overlaps
from moe_replay.routing.guard.decision import Guard
from moe_replay.routing.guard.evidence import judge
from moe_replay.routing.guard.groups import explain_faults
from moe_replay.routing.guard.places import RouteRows, look_closer, with_rho
from moe_replay.routing.guard.summary import summarise
from moe_replay.routing.guard.table import SampleEvidence, StepPart, StepTable, join_evidence
from moe_replay.routing.guard.verdict import (
    Fault,
    Finding,
    Owner,
    SecondLook,
    Status,
    StepRecord,
    Verdict,
)

__all__ = [
    "PLACES",
    "Baseline",
    "Fault",
    "Finding",
    "Guard",
    "OverlapCounts",
    "Owner",
    "RouteReport",
    "RouteRows",
    "SampleEvidence",
    "SecondLook",
    "Status",
    "StepPart",
    "StepRecord",
    "StepTable",
    "Verdict",
    "check_routes",
    "count_overlaps",
    "explain_faults",
    "join_evidence",
    "judge",
    "look_closer",
    "summarise",
    "with_rho",
]
