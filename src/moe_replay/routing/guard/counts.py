"""Count how much each live route shares with its own replayed route and with those of other places.

Counting runs where the ids are (a twin of `count_overlaps` counts on the device, one layer at a
time); judging sees only these counts. All of them are exact integers, so both implementations can
be compared bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moe_replay.errors import TraceError

if TYPE_CHECKING:
    from jaxtyping import Bool, Int16, Int32, Int64, Integer

PLACES = ("token +1", "token -1", "layer +1", "layer -1", "ids modulo 256")
"""Where else the right route of a row could be.

``token +1``: in the row of the next token, so the routes came one row late. ``layer +1``: in the
next layer of this rank. ``ids modulo 256``: in its own row, but ids above 255 were wrapped into 8
bits.
"""
TOKEN_PLACES = ((0, 1), (1, -1))
"""(entry of `PLACES`, distance in tokens)."""
LAYER_PLACES = ((2, 1), (3, -1))
"""(entry of `PLACES`, distance in entries of the layer dim)."""
WRAPPED_PLACE = 4
"""Entry of `PLACES` of ids that were wrapped at `WRAP`."""
WRAP = 256
"""First id that 8 bits cannot hold."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OverlapCounts:
    """Shared expert slots of the valid rows of one microbatch, in the layers and rows of one rank.

    ``own`` of a row and layer is ``|live & replayed|``, from 0 to ``topk``. ``other`` is the same
    with the replayed route at another place, and equals ``own`` if that place is not on this rank,
    not valid, or does not exist. Worked example with topk 4: the live route of a row shares 3 slots
    with its own replayed route in layer 0 and 1 in layer 1; with that of the next row it shares 2
    and 4. Then ``own`` = 4, ``nearer["token +1"]`` = max(2-3, 0) + max(4-1, 0) = 3 and
    ``farther["token +1"]`` = max(3-2, 0) + max(1-4, 0) = 1.
    """

    layers: tuple[int, ...]
    """Global decoder indices of the counted layers, in the order of the layer dim."""
    topk: int
    """Experts a token."""
    num_experts: int
    """Experts a layer."""

    position: Int32[np.ndarray, " rows"]
    """``[rows]``, position in its sample of each valid row; rows are ordered by (sample,
    position)."""
    own: Int16[np.ndarray, " rows"]
    """``[rows]``, slots shared with the row's own replayed route, summed over layers."""
    others: Int32[np.ndarray, " rows"]
    """``[rows]``, slots shared with the replayed routes of all other valid rows here of the same
    sample, summed over layers and these rows. Divided by the number of these rows it is what the
    live route shares by chance."""
    flips: Int16[np.ndarray, " rows"]
    """``[rows]``, layers in which the live expert set differs from the replayed one."""
    nearer: Int16[np.ndarray, "places rows"]
    """``[places, rows]``, sum over layers of ``max(other - own, 0)``."""
    farther: Int16[np.ndarray, "places rows"]
    """``[places, rows]``, sum over layers of ``max(own - other, 0)``."""
    repeats: Bool[np.ndarray, " rows"]
    """``[rows]``, the replayed route equals that of the row before (position - 1, valid, on this
    rank) in all layers, and the live one does not. False when there is no such row."""

    sample_ids: Int64[np.ndarray, " samples"]
    """``[samples]``, ids of the samples with valid rows here, increasing."""
    num_rows: Int64[np.ndarray, " samples"]
    """``[samples]``, valid rows here of each: the first ``num_rows[0]`` rows belong to
    ``sample_ids[0]``."""
    layer_own: Int64[np.ndarray, "samples layers"]
    """``[samples, layers]``, ``own`` summed over rows."""
    layer_others: Int64[np.ndarray, "samples layers"]
    """``[samples, layers]``, ``others`` summed over rows."""
    layer_flips: Int64[np.ndarray, "samples layers"]
    """``[samples, layers]``, rows whose expert sets differ."""
    layer_own_squares: Int64[np.ndarray, "samples layers"]
    """``[samples, layers]``, ``own**2`` of each row, summed over rows."""
    layer_nearer: Int64[np.ndarray, "places samples layers"]
    """``[places, samples, layers]``, ``max(other - own, 0)`` summed over rows."""
    layer_farther: Int64[np.ndarray, "places samples layers"]
    """``[places, samples, layers]``, ``max(own - other, 0)`` summed over rows."""
    layer_gain_squares: Int64[np.ndarray, "places samples layers"]
    """``[places, samples, layers]``, ``(other - own)**2`` summed over rows."""

    @property
    def starts(self) -> Int64[np.ndarray, " samples"]:
        """First row of each sample."""
        return np.cumsum(self.num_rows) - self.num_rows


def count_overlaps(
    expert_ids: Integer[np.ndarray, "rows layers topk"],
    live_ids: Integer[np.ndarray, "rows layers topk"],
    *,
    valid: Bool[np.ndarray, " rows"],
    sample: Integer[np.ndarray, " rows"],
    position: Integer[np.ndarray, " rows"],
    layers: Sequence[int],
    num_experts: int,
) -> OverlapCounts:
    """Count shared slots between the live and the replayed routes of the rows of one microbatch.

    Rows may be in any order: neighbours are found by (sample, position). Rows with ``valid=False``
    are ignored. Each pair (sample, position) may occur once among valid rows; ids must be below
    ``num_experts`` and unique within a live route.
    """
    rows = np.flatnonzero(valid)
    rows = rows[np.lexsort((position[rows], sample[rows]))]
    at, owner = position[rows].astype(np.int64), sample[rows].astype(np.int64)
    sample_ids, entry, num_rows = np.unique(owner, return_inverse=True, return_counts=True)
    follows = (np.diff(at) == 1) & (np.diff(owner) == 0)  # the next row is the next token's
    if ((np.diff(at) == 0) & (np.diff(owner) == 0)).any():
        raise TraceError(
            "guard: two valid rows have the same sample and position, expected each token once; give the samples of a "
            "microbatch different ids, and count positions from the start of each sample"
        )
    ids, live = expert_ids[rows].astype(np.int64), live_ids[rows].astype(np.int64)
    topk = ids.shape[2]
    own, others, gains, same_live = _by_layer(ids, live, entry, follows, num_experts)
    nearer, farther = np.maximum(gains, 0), np.maximum(-gains, 0)
    return OverlapCounts(
        layers=tuple(layers),
        topk=topk,
        num_experts=num_experts,
        position=at.astype(np.int32),
        own=own.sum(axis=1).astype(np.int16),
        others=others.sum(axis=1).astype(np.int32),
        flips=(own < topk).sum(axis=1).astype(np.int16),
        nearer=nearer.sum(axis=2).astype(np.int16),
        farther=farther.sum(axis=2).astype(np.int16),
        repeats=_repeats(ids, follows & ~same_live),
        sample_ids=sample_ids,
        num_rows=num_rows.astype(np.int64),
        layer_own=_by_sample(own, entry),
        layer_others=_by_sample(others, entry),
        layer_flips=_by_sample((own < topk).astype(np.int64), entry),
        layer_own_squares=_by_sample(own**2, entry),
        layer_nearer=_by_sample(nearer, entry),
        layer_farther=_by_sample(farther, entry),
        layer_gain_squares=_by_sample(gains**2, entry),
    )


def _by_layer(
    ids: Int64[np.ndarray, "rows layers topk"],
    live: Int64[np.ndarray, "rows layers topk"],
    entry: Int64[np.ndarray, " rows"],
    follows: Bool[np.ndarray, " pairs"],
    num_experts: int,
) -> tuple[
    Int64[np.ndarray, "rows layers"],
    Int64[np.ndarray, "rows layers"],
    Int64[np.ndarray, "places rows layers"],
    Bool[np.ndarray, " pairs"],
]:
    """Return own, others and gains of each row and layer, and which rows repeat the live routes."""
    num_layers, topk = ids.shape[1:]
    num_samples = int(entry.max(initial=-1)) + 1
    own, others = np.zeros((2, len(ids), num_layers), np.int64)
    gains = np.zeros((len(PLACES), *own.shape), np.int64)
    same_live = np.ones(max(len(ids) - 1, 0), bool)
    for layer in range(num_layers):
        chosen = chosen_mask(live[:, layer], num_experts)
        own[:, layer] = _shared(chosen, ids[:, layer])
        # How often the sample's replayed routes use each expert, the row's own route included.
        used = np.bincount(
            (entry[:, None] * num_experts + ids[:, layer]).ravel(),
            minlength=num_samples * num_experts,
        )
        others[:, layer] = (
            used[entry[:, None] * num_experts + live[:, layer]].sum(axis=1) - own[:, layer]
        )
        gains[:, :, layer] = _gains(chosen, ids, layer, own[:, layer], follows)
        same_live &= _shared(chosen[1:], live[:-1, layer]) == topk
    return own, others, gains, same_live


def chosen_mask(
    ids: Integer[np.ndarray, "rows topk"], num_experts: int
) -> Bool[np.ndarray, "rows experts"]:
    """Return which experts each row uses."""
    chosen = np.zeros((len(ids), num_experts), bool)
    np.put_along_axis(chosen, ids.astype(np.int64, copy=False), True, axis=1)
    return chosen


def _gains(
    chosen: Bool[np.ndarray, "rows experts"],
    ids: Int64[np.ndarray, "rows layers topk"],
    layer: int,
    own: Int64[np.ndarray, " rows"],
    follows: Bool[np.ndarray, " pairs"],
) -> Int64[np.ndarray, "places rows"]:
    """Return ``other - own`` of one layer at each place; 0 if the place does not exist."""
    other = np.repeat(own[None], len(PLACES), axis=0)
    for place, distance in TOKEN_PLACES:
        here, there = (slice(None, -1), slice(1, None))[::distance]
        shared = _shared(chosen[here], ids[there, layer])
        other[place, here] = np.where(follows, shared, other[place, here])
    for place, distance in LAYER_PLACES:
        if 0 <= layer + distance < ids.shape[1]:
            other[place] = _shared(chosen, ids[:, layer + distance])
    if chosen.shape[1] > WRAP:
        # A recorded id above 255 was not wrapped, so it is evidence against this place.
        narrow = ids[:, layer] < WRAP
        found = np.take_along_axis(wrapped_mask(chosen), np.where(narrow, ids[:, layer], 0), axis=1)
        other[WRAPPED_PLACE] = (found & narrow).sum(axis=1)
    return other - own


def wrapped_mask(
    chosen: Bool[np.ndarray, "*rows experts"],
) -> Bool[np.ndarray, "*rows wrapped"]:
    """Return which ids each row uses once they are wrapped at `WRAP`."""
    wrapped = np.zeros((*chosen.shape[:-1], WRAP), bool)
    for start in range(0, chosen.shape[-1], WRAP):
        part = chosen[..., start : start + WRAP]
        wrapped[..., : part.shape[-1]] |= part
    return wrapped


def _repeats(
    ids: Int64[np.ndarray, "rows layers topk"], could: Bool[np.ndarray, " pairs"]
) -> Bool[np.ndarray, " rows"]:
    """Return which rows equal the previous row in all layers, among the pairs that ``could``."""
    ordered = np.sort(ids, axis=2)
    repeats = np.zeros(len(ids), bool)
    repeats[1:] = could & (ordered[1:] == ordered[:-1]).all(axis=(1, 2))
    return repeats


def _by_sample(
    values: Int64[np.ndarray, "*places rows layers"], entry: Int64[np.ndarray, " rows"]
) -> Int64[np.ndarray, "*places samples layers"]:
    """Sum the rows of each sample; rows are ordered by sample, and no sample is empty."""
    first = np.flatnonzero(np.diff(entry, prepend=-1))
    return np.add.reduceat(values, first, axis=-2) if len(entry) else values


def _shared(
    chosen: Bool[np.ndarray, "rows experts"], ids: Int64[np.ndarray, "rows topk"]
) -> Int64[np.ndarray, " rows"]:
    return np.take_along_axis(chosen, ids, axis=1).sum(axis=1)
