"""The guard: proves sample by sample that replayed routes belong to their rows.

::

    replayed and live ids of a microbatch
      | count_overlaps      counts.py        slots shared with routes here and elsewhere
      v
    OverlapCounts           stay on their rank
      | summarise           summary.py       sums by (sample, layer)
      v
    StepPart                gathered from all ranks
      | Guard.baseline      baseline.py      what the usual sample looks like, same on every rank
      v
    Baseline
      | judge               evidence.py      strongest sign of each test in each sample
      v
    SampleEvidence          gathered from all ranks
      | Guard.decide        sample_tests.py  every test of every sample against its threshold
      |                     groups.py        layers, ranks, servers, the step
      |                     sums.py          servers over steps
      v
    Verdict                 MISALIGNED, or SUSPECT: look_closer (places.py), then decide again

A *place* is where else the right route of a row could be: in the next row, the next layer, ... A
*sign* is a deviation from what is usual, measured in nats (minus the natural logarithm of a bound
on its probability).

Example: 128 samples of 64 rows, top-8 of 64 experts in 6 layers. Sample 17 got its routes one row
late. Its live routes share 900 of its 3,072 slots with their own replayed routes, they would share
800 by chance, and the median sample shares 2,900. The routes of the next row share 2,880. Slots
that fit only one of the two speak 2,010 times for "token +1" and 30 times against: ``paired
sample`` has over 100 nats, far above its threshold of about 17 (one false alarm in 10,000 steps).
The sample is MISALIGNED at once, with the cause "token shift +1", because no drift makes another
row's routes fit better. Had its routes been random, only ``lost sample`` would speak, which strong
drift could also explain: a SUSPECT.

In: live and replayed expert ids, as counts of shared slots. Out: a verdict for each sample, server,
rank and layer.
"""

from moe_replay.routing.guard.baseline import Baseline
from moe_replay.routing.guard.check import RouteReport, check_routes
from moe_replay.routing.guard.counts import PLACES, OverlapCounts, count_overlaps
from moe_replay.routing.guard.decision import Guard, drift_rho
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
    with_names,
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
    "drift_rho",
    "explain_faults",
    "join_evidence",
    "judge",
    "look_closer",
    "summarise",
    "with_names",
    "with_rho",
]
