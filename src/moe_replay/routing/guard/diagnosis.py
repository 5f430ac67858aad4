"""What explains routes that disagree with the router: every known misalignment, tried on the same rows.

In: GuardEvidence. Out: Diagnosis. Called by: guard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moe_replay.errors import TraceError
from moe_replay.routing.guard.agreement import (
    HEALTHY_OVERLAP,
    GuardEvidence,
    Overlaps,
    agreement_floor,
    agreement_of,
    mean_error,
    row_gain,
)
from moe_replay.routing.guard.hypotheses import MIN_GAIN, Cause, alternatives, rarities

if TYPE_CHECKING:
    from jaxtyping import Float64

SIGMAS = 4.0
"""Standard errors by which any difference must be clear."""
MAX_DIAGNOSED_ROWS = 512
# Hypotheses within this of the best are as good; the simplest of them, tried first, is named.
_TIE = 0.03
# Rows of a sample that must all be alike before its routes count as constant.
_LEAST_CONSTANT_ROWS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """The hypothesis that explains the live routes best."""

    cause: Cause
    """The kind of misalignment."""
    agreement: float
    """Mean slot overlap under the hypothesis, over the rows to which it applies."""
    aligned: float
    """Mean slot overlap of the routes as they were replayed, over all sampled rows."""
    shift: int
    """Rows, layer entries or ids that the routes are off by; 0 where the cause has no such number."""
    sentence: str
    """The finding in words, ready for an error message."""


def diagnose(
    evidence: GuardEvidence, *, num_experts: int, layers: Sequence[int] | None = None
) -> Diagnosis:
    """Try every hypothesis on the sampled rows and return the one that explains them best.

    ``layers`` (global indices) restricts the live side: only the routes wanted by those layers are explained, from
    anywhere. A hypothesis is believed when it beats the aligned rows by `MIN_GAIN` and by `SIGMAS` standard errors.
    """
    if len(evidence.rows) > MAX_DIAGNOSED_ROWS:
        spread = np.linspace(0, len(evidence.rows) - 1, MAX_DIAGNOSED_ROWS).astype(np.int64)
        evidence = evidence.select(spread)
    if not len(evidence.rows):
        raise TraceError("guard evidence: no row was sampled, so there is nothing to diagnose")
    found = Overlaps(evidence, num_experts)
    wanted = np.isin(evidence.layers, evidence.layers if layers is None else layers)
    aligned = found.aligned[:, wanted]
    if (filled := _constant_fill(found, wanted)) is not None:
        return filled
    best: Diagnosis | None = None
    for tried in (alternatives, rarities):
        for hypothesis in tried(found):
            overlap = hypothesis.overlap[:, wanted]
            agreement = _believed(overlap, aligned, evidence.live_ids.shape[2])
            if agreement is not None and (best is None or agreement > best.agreement + _TIE):
                best = Diagnosis(
                    cause=hypothesis.cause,
                    agreement=agreement,
                    aligned=float(aligned.mean()),
                    shift=hypothesis.shift,
                    sentence=f"{hypothesis.sentence} (that explains {agreement:.0%} of the expert slots)",
                )
        if best is not None and best.agreement >= HEALTHY_OVERLAP:
            break
    return best or _without_hypothesis(found, wanted)


def _constant_fill(found: Overlaps, wanted: np.ndarray) -> Diagnosis | None:
    """Return that layers were never written, when these are all that disagrees; a collapsed router agrees with its routes."""
    evidence = found.evidence
    constant = np.ones(len(wanted), dtype=bool)
    for sample in np.unique(found.sample):
        ids = evidence.expert_ids[evidence.valid & (evidence.sample == sample)]
        constant &= (ids == ids[0]).all(axis=(0, 2)) & (len(ids) >= _LEAST_CONSTANT_ROWS)
    overlap = found.aligned.mean(axis=0)
    filled = constant & wanted & (overlap < HEALTHY_OVERLAP)
    others = wanted & ~filled
    if not filled.any() or (others.any() and overlap[others].mean() < HEALTHY_OVERLAP):
        return None
    layers = [layer for layer, bad in zip(evidence.layers, filled, strict=True) if bad]
    held = evidence.expert_ids[evidence.rows[0], int(filled.argmax())].tolist()
    return Diagnosis(
        cause=Cause.CONSTANT_FILL,
        agreement=float(overlap[wanted].mean()),
        aligned=float(overlap[wanted].mean()),
        shift=0,
        sentence=f"constant fill: layers {layers} hold the same experts for all tokens of a sample ({held} in layer "
        f"{layers[0]}), while their routers choose others; the engine did not capture these layers",
    )


def _believed(
    overlap: Float64[np.ndarray, "sampled layers"],
    aligned: Float64[np.ndarray, "sampled layers"],
    topk: int,
) -> float | None:
    """Return the mean overlap of a hypothesis that beats the aligned rows clearly, else None."""
    gain = row_gain(overlap, aligned)
    gain = gain[np.isfinite(gain)]
    slots = topk * aligned.shape[1]
    if len(gain) < 2 or gain.mean() < MIN_GAIN + SIGMAS * mean_error(gain, slots):
        return None
    return float(np.nanmean(overlap))


def _without_hypothesis(found: Overlaps, wanted: np.ndarray) -> Diagnosis:
    measured = agreement_of(found)
    agreement = float(measured.slot_overlap[wanted].mean())
    floor = agreement_floor(
        found.num_experts, found.evidence.live_ids.shape[2], float(measured.chance[wanted].mean())
    )
    if agreement >= floor > 0:
        cause, sentence = Cause.ALIGNED, "the routes lie where they belong; what differs is drift"
    else:
        cause, sentence = (
            Cause.UNEXPLAINED,
            "no shift of tokens or layers, no other sample of this microbatch and no renaming of expert ids explains "
            "the routes: they are random, of another model or weights, or of a sample that is not in this microbatch",
        )
    return Diagnosis(
        cause=cause, agreement=agreement, aligned=agreement, shift=0, sentence=sentence
    )
