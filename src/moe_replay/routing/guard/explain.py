"""Words for faults of a whole step, a layer, a rank or a server: what a look at one of its samples says.

In: a verdict, and the routes of the sample that agrees least. Out: the verdict with causes.
"""

from __future__ import annotations

from dataclasses import replace

from moe_replay.routing.guard.places import RouteRows, look_closer
from moe_replay.routing.guard.verdict import Finding, Owner, Status, Verdict


def explain_faults(verdict: Verdict, rows: RouteRows, *, usual_information: float) -> Verdict:
    """Return the verdict with words for its faults: what a look at the sample that agrees least says about each.

    Where every sample is wrong there is no usual one to compare with, so half of full information is asked for at least.
    """
    if not verdict.faults or not len(verdict.sample_ids):
        return verdict
    worst = int(verdict.sample_ids[int(verdict.agreement.argmin())])
    faults = []
    for fault in verdict.faults:
        layer = int(fault.name) if fault.kind == "layer" else None
        looked = look_closer(
            rows, [whole_sample(worst, layer)], usual_information=max(usual_information, 0.5)
        )
        said = next((look.place or look.cause for look in looked.values()), None)
        words = f"{fault.cause}; in sample {worst}: {said}" if said else fault.cause
        faults.append(replace(fault, cause=words))
    return replace(verdict, faults=tuple(faults))


def whole_sample(sample: int, layer: int | None = None) -> Finding:
    """Return a suspect of which all rows are to be looked at."""
    return Finding(
        sample=sample,
        status=Status.SUSPECT,
        test="",
        nats=0.0,
        threshold=0.0,
        cause="",
        layer=layer,
        first=0,
        last=2**31 - 1,
        agreement=0.0,
        owner=Owner(),
    )
