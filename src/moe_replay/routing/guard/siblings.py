"""Siblings: tokens that samples of one prompt have in common were routed by the same weights, so their routes must agree.

Recorded routes are compared with recorded ones; no live route is needed, so this sees swapped prompts before any pass, and
drift is no part of it. It is blind where siblings got the same wrong rows, as from a shared prefix cache.

In: recorded routes and token ids of the samples of one prompt. Out: nats for each sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moe_replay.routing.guard.statistics import MIX, row_keys, shortfall_nats

if TYPE_CHECKING:
    from jaxtyping import Bool, Integer

_MIN_SIBLINGS = 3  # of equal tokens so far, for a majority
_OUTLIER = 5.0  # times the usual share of differing rows is more than an engine's kernels explain
_MIN_DIFFERENT = 1e-3  # share of rows that may differ in any engine


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sibling:
    """The recorded routes of one sample."""

    sample: int
    """Its number."""
    token_ids: Integer[np.ndarray, " tokens"]
    """``[tokens]``, prompt and completion."""
    expert_ids: Integer[np.ndarray, "tokens layers topk"]
    """``[tokens, layers, topk]``, in any order within a row."""
    valid: Bool[np.ndarray, " tokens"]
    """``[tokens]``, False where no route was recorded."""


def sibling_evidence(groups: Sequence[Sequence[Sibling]]) -> dict[int, float]:
    """Return sample -> nats by which it differs from its siblings more than the usual sample does.

    Each group holds the samples of one prompt that the same weights sampled. A row is compared with the majority of the
    samples whose tokens are equal up to that row; three are needed. The usual share of rows that differ (kernels whose sums
    depend on the batch flip some) is the median over all samples.
    """
    compared: dict[int, tuple[int, int]] = {}
    for group in groups:
        compared.update(_compare(group))
    if not compared:
        return {}
    numbers = np.array(list(compared.values()), np.float64)
    equal, rows = numbers[:, 0], numbers[:, 1]
    usual = float(np.median(equal / rows))
    share = 1 - max(_OUTLIER * (1 - usual), _MIN_DIFFERENT)
    nats = shortfall_nats(equal, rows, np.full(len(rows), max(share, 0.0)))
    return {sample: float(value) for sample, value in zip(compared, nats, strict=True)}


def _compare(group: Sequence[Sibling]) -> Mapping[int, tuple[int, int]]:
    """Return sample -> (rows that equal those of the majority, rows that could be compared)."""
    if len(group) < _MIN_SIBLINGS:
        return {}
    length = max(len(one.token_ids) for one in group)
    routes = np.zeros((len(group), length), np.uint64)
    # The history of each sample's tokens as one number a row: equal numbers mean equal tokens so far.
    tokens = np.zeros((len(group), length), np.uint64)
    held = np.zeros((len(group), length), bool)
    for entry, one in enumerate(group):
        count = len(one.token_ids)
        routes[entry, :count] = _row_keys(one.expert_ids)
        tokens[entry, :count] = _history_keys(one.token_ids)
        tokens[entry, count:] = entry + 1  # nobody's history
        held[entry, :count] = one.valid
    # Nearly all rows in common are equal in all siblings; only the others are looked at one by one.
    alike = ((tokens == tokens[0]) & (routes == routes[0]) & held).all(axis=0)
    equal, rows = np.full((2, len(group)), int(alike.sum()), np.int64)
    for row in np.flatnonzero(~alike):
        # Samples that have parted never meet again, so the rows in common end where no three share their tokens.
        if np.unique(tokens[:, row], return_counts=True)[1].max() < _MIN_SIBLINGS:
            break
        here = np.flatnonzero(held[:, row])
        for history in np.unique(tokens[here, row]):
            same = here[tokens[here, row] == history]
            if len(same) < _MIN_SIBLINGS:
                continue
            keys, counts = np.unique(routes[same, row], return_counts=True)
            if counts.max() * 2 <= len(same):
                continue  # no majority: nobody is told wrong
            rows[same] += 1
            equal[same] += routes[same, row] == keys[counts.argmax()]
    return {
        one.sample: (int(equal[entry]), int(rows[entry]))
        for entry, one in enumerate(group)
        if rows[entry]
    }


def _row_keys(ids: Integer[np.ndarray, "tokens layers topk"]) -> np.ndarray:
    """Return one number for the expert sets of each row, in all layers."""
    ordered = np.sort(ids.astype(np.uint64), axis=2).reshape(len(ids), -1)
    return row_keys(ordered)


def _history_keys(token_ids: Integer[np.ndarray, " tokens"]) -> np.ndarray:
    key, keys = 0, np.zeros(len(token_ids), np.uint64)
    for row, token in enumerate(token_ids.tolist()):
        key = ((key ^ (token + 1)) * int(MIX)) % 2**64
        key ^= key >> 29
        keys[row] = key
    return keys
