"""Where the gap between an engine and a trainer comes from: measured, tested, said in plain words.

::

    rollout on disk, or Measured of your own
      | measuring.py      each sequence through the trainer: live, and under the engine's routes
      v
    Measured              log-probabilities, routes, margins, exact KL of one sequence
      | diagnosis.py      sums; routes.py asks the guard, belonging.py tests log-probabilities
      v
    Diagnosis             gap, flips, coverage, and a Conclusion (verdict.py)

In: Measured sequences and their Setting. Out: Diagnosis.
"""

from moe_replay.diagnose.diagnosis import Diagnosis, Gap, MarginSummary, diagnose
from moe_replay.diagnose.measured import Measured, Setting
from moe_replay.diagnose.statistics import Estimate
from moe_replay.diagnose.verdict import Cause, Conclusion

__all__ = [
    "Cause",
    "Conclusion",
    "Diagnosis",
    "Estimate",
    "Gap",
    "MarginSummary",
    "Measured",
    "Setting",
    "diagnose",
]
