"""How close the choices were: the gap between the last expert chosen and the first one left out.

Two passes in different number formats flip where that gap is small. Flips at wide gaps are something else: routes of
other tokens, or other weights. `compare_margins` puts the two side by side.

In: router scores, pairs of traces. Out: MarginComparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moe_replay.errors import TraceError
from moe_replay.routing.compare import flipped
from moe_replay.routing.trace import RoutingTrace

if TYPE_CHECKING:
    from jaxtyping import Float, Float64, Int64

NUM_BINS = 10
"""Bins of equally many (token, layer) pairs, from the narrowest margins to the widest."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MarginComparison:
    """Margins where two recordings flip, beside those where they agree. All means are nan over nothing."""

    num_flips: int
    """(token, layer) pairs that flip."""
    num_agreeing: int
    """Those that do not."""
    median_margin_at_flips: float
    """In the unit of the scores."""
    median_margin_elsewhere: float
    """In the unit of the scores."""
    margin_edges: Float64[np.ndarray, " edges"]
    """``[bins + 1]``, margins between which each bin lies."""
    flip_frac_by_margin: Float64[np.ndarray, " bins"]
    """``[bins]``, share of the pairs in each bin that flip; drift falls steeply, misaligned routes do not."""
    num_pairs_by_margin: Int64[np.ndarray, " bins"]
    """``[bins]``, pairs behind each entry of ``flip_frac_by_margin``."""


def topk_margins(
    scores: Float[np.ndarray, "tokens layers experts"], topk: int
) -> Float[np.ndarray, "tokens layers"]:
    """Return by how much the ``topk``-th best score exceeds the next one, which was not chosen.

    ``topk_margins([[[0.5, 0.2, 0.3]]], 1)`` is ``[[0.2]]``. Use the scores that the router chooses by: with its bias, and
    within its groups where it has any.

    Raises:
        TraceError: when every expert or none is chosen, or a score is not a number.
    """
    num_experts = scores.shape[2]
    if not 1 <= topk < num_experts:
        raise TraceError(f"topk is {topk} of {num_experts} experts, expected at least one left out")
    if np.isnan(scores).any():
        raise TraceError(
            f"{int(np.isnan(scores).sum())} scores are not numbers; the router's input overflowed, or these rows were "
            "never scored"
        )
    ordered = np.partition(scores, (num_experts - topk - 1, num_experts - topk), axis=2)
    return ordered[..., num_experts - topk] - ordered[..., num_experts - topk - 1]


def compare_margins(
    pairs: Sequence[tuple[RoutingTrace, RoutingTrace]],
    margins: Sequence[Float[np.ndarray, "_ layers"]],
) -> MarginComparison:
    """Compare the margins of the first recording of each pair where the second flips, and where it does not.

    ``margins`` holds one array a pair, as `topk_margins` gives it for the layers of the traces.

    Raises:
        TraceError: when there are no pairs, traces do not compare, or margins have another shape than their trace.
    """
    if not pairs or len(pairs) != len(margins):
        raise TraceError(
            f"{len(pairs)} pairs of traces and {len(margins)} arrays of margins, expected at least one and as many of both"
        )
    every_flip, every_margin = [], []
    for number, ((ours, theirs), margin) in enumerate(zip(pairs, margins, strict=True)):
        flips, held = flipped(ours, theirs)
        if margin.shape != flips.shape:
            raise TraceError(
                f"sequence {number}: margins of shape {margin.shape}, the traces have {flips.shape} (tokens, layers)"
            )
        every_flip.append(flips[held].ravel())
        every_margin.append(margin[held].ravel().astype(np.float64))
    flip, margin = np.concatenate(every_flip), np.concatenate(every_margin)
    num_flips = int(flip.sum())
    order = np.argsort(margin, kind="stable")
    bins = np.array_split(order, NUM_BINS)
    return MarginComparison(
        num_flips=num_flips,
        num_agreeing=len(flip) - num_flips,
        median_margin_at_flips=_median(margin[flip]),
        median_margin_elsewhere=_median(margin[~flip]),
        margin_edges=_edges(margin[order], [len(part) for part in bins]),
        flip_frac_by_margin=np.array([flip[part].mean() if len(part) else np.nan for part in bins]),
        num_pairs_by_margin=np.array([len(part) for part in bins], dtype=np.int64),
    )


def _median(values: Float64[np.ndarray, " values"]) -> float:
    return float(np.median(values)) if len(values) else float("nan")


def _edges(
    ordered: Float64[np.ndarray, " values"], sizes: list[int]
) -> Float64[np.ndarray, " edges"]:
    if not len(ordered):
        return np.full(len(sizes) + 1, np.nan)
    starts = np.minimum(np.cumsum([0, *sizes]), len(ordered) - 1)
    return ordered[starts]
