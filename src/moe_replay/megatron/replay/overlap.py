"""Counts the overlap of live and replayed routes on the device: every row, and no id is copied.

In: replayed routes of a microbatch, live ids of one layer after the other. Out: OverlapCounts,
RouteUse.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int32, Int64, Integer, UInt8

from moe_replay.megatron.replay.upload import Download, upload
from moe_replay.routing import RouteSlice
from moe_replay.routing.guard import OverlapCounts
from moe_replay.routing.guard.counts import (
    LAYER_PLACES,
    PLACES,
    TOKEN_PLACES,
    WRAP,
    WRAPPED_PLACE,
)

_MAX_BYTES = 2**26
"""Maximum bytes of the mask over experts and of the ids looked up in it, for one batch of rows."""
_NUM_PLACES = len(PLACES)
# Rows of the running sums: own, others, flips, nearer and farther at each place, layers in which
# the live and in which the replayed set is that of the row before.
_SAME_LIVE, _SAME_REPLAYED = 3 + 2 * _NUM_PLACES, 4 + 2 * _NUM_PLACES


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowOwners:
    """Whose token each row of a microbatch's routers holds."""

    sample: Int64[np.ndarray, " rows"]
    """Sample id, -1 at padding."""
    position: Int64[np.ndarray, " rows"]
    """Position in the sample."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RouteUse:
    """Which experts the replayed rows of a microbatch would choose live, layer by layer."""

    layers: tuple[int, ...]
    """Global decoder indices."""
    num_rows: int
    """Rows counted."""
    favourite: Int64[np.ndarray, "layers topk"]
    """The experts chosen by the largest count of rows, in increasing order."""
    favourite_times: Int64[np.ndarray, " layers"]
    """Rows that choose exactly these."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WatchedRoutes:
    """Live next to replayed routes of one microbatch, in the rows and layers of this rank."""

    counts: OverlapCounts
    """What the guard judges."""
    use: RouteUse
    """Flips and favourites, for the metrics."""
    live_ids: Integer[np.ndarray, "rows layers topk"] | None
    """Live ids of all router rows, in the order of `RouterScope.layers`; None unless kept."""


class OverlapCounter:
    """Counts one microbatch on one rank as `count_overlaps` does; layers come in any order, once.

    Worked example, one layer, top-2, four rows of a sample as live | replayed: (1 2 | 1 2),
    (3 4 | 1 2), (3 5 | 3 4), (6 7 | 3 5). ``own`` is 2, 0, 1, 0. The replayed route of the next row
    shares 0, 1, 2 slots with the first three live ones: "token +1" gains 0, 1, 1 and loses 2, 0, 0.
    """

    def __init__(
        self,
        routes: RouteSlice,
        expert_ids: Integer[torch.Tensor, "held rows topk"],
        owners: RowOwners,
        *,
        layers: tuple[int, ...],
    ) -> None:
        """Count the valid rows of ``routes``, which are on the device as ``expert_ids``."""
        device = expert_ids.device
        rows = np.flatnonzero(routes.valid)
        # Packed rows are in this order already, but for the two stretches of a context-parallel
        # shard.
        rows = rows[np.lexsort((owners.position[rows], owners.sample[rows]))]
        sample, position = owners.sample[rows], owners.position[rows]
        self._position = position.astype(np.int32)
        self._sample_ids, starts, self._num_rows = np.unique(
            sample, return_index=True, return_counts=True
        )
        self._layers, self._topk = layers, expert_ids.shape[2]
        self._num_experts = routes.num_experts
        self._entry = [routes.layers.index(layer) for layer in layers]
        self._left = set(layers)
        self._ids, self._rows = expert_ids, upload(rows, device)
        self._bounds = upload(np.append(starts, len(rows)), device)
        number = np.repeat(np.arange(len(starts)), self._num_rows)
        # Of the first expert of a row's sample in the flat table [samples * experts].
        self._table_start = upload(number * self._num_experts, device)
        follows = np.zeros(len(rows) + 1, dtype=bool)
        follows[1:-1] = (np.diff(sample) == 0) & (np.diff(position) == 1)
        # follows[i]: row i holds the token after that of row i - 1; so follows[i + 1] says that row
        # i has a next one.
        self._follows = upload(follows, device)
        self._row_sums = torch.zeros(
            (_SAME_REPLAYED + 1, len(rows)), dtype=torch.int32, device=device
        )
        self._sample_sums = torch.zeros(
            (len(layers), 4 + 3 * _NUM_PLACES, len(starts)), dtype=torch.int64, device=device
        )
        self._use = torch.zeros((len(layers), self._topk + 1), dtype=torch.int64, device=device)
        self._down: tuple[Download, ...] = ()

    def add(self, layer: int, live_ids: Int64[torch.Tensor, "rows topk"]) -> None:
        """Take the live ids of all router rows in ``layer``; the last layer sends the counts."""
        self._left.remove(layer)
        number = self._layers.index(layer)
        live = live_ids.index_select(0, self._rows)
        looked_up = self._places(number, live)
        others = self._others(looked_up[0], live)
        favourite = self._favourite(live)
        width = self._num_experts + 8 * self._topk * len(looked_up)
        size, num_rows = max(1, _MAX_BYTES // width), len(live)
        times = torch.zeros((), dtype=torch.int64, device=live.device)
        values = torch.zeros((4 + 3 * _NUM_PLACES, num_rows), dtype=torch.int64, device=live.device)
        for start in range(0, num_rows, size):
            here = slice(start, min(start + size, num_rows))
            chosen = torch.zeros(
                (here.stop - start, self._num_experts), dtype=torch.uint8, device=live.device
            ).scatter_(1, live[here], 1)
            times += chosen.index_select(1, favourite).all(dim=1).sum()
            ids = torch.cat([ids[here] for ids in looked_up], dim=1)
            shared = chosen.gather(1, ids).view(len(ids), -1, self._topk).sum(2, dtype=torch.int32)
            gains = self._gains(shared, here)
            if self._num_experts > WRAP:
                wrapped = _wrapped_overlap(chosen, looked_up[0][here])
                gains[WRAPPED_PLACE] = wrapped - shared[:, 0]
            self._add_rows(shared, others[here], gains, looked_up, here, values)
        self._sample_sums[number] = _sums_between(values, self._bounds)
        self._use[number, :-1], self._use[number, -1] = favourite, times
        if not self._left:
            self._send()

    def finish(self) -> tuple[OverlapCounts, RouteUse]:
        """Return the counts, once every layer has been added."""
        assert not self._left, f"layers {sorted(self._left)} have not run"
        small, others, repeats, by_sample, use = (part.array() for part in self._down)
        places = _NUM_PLACES
        tables = by_sample.transpose(1, 2, 0)
        counts = OverlapCounts(
            layers=self._layers,
            topk=self._topk,
            num_experts=self._num_experts,
            position=self._position,
            own=small[0],
            others=others,
            flips=small[1],
            nearer=small[2 : 2 + places],
            farther=small[2 + places :],
            repeats=repeats,
            sample_ids=self._sample_ids,
            num_rows=self._num_rows,
            layer_own=tables[0],
            layer_others=tables[1],
            layer_flips=tables[2],
            layer_own_squares=tables[3],
            layer_nearer=tables[4 : 4 + places],
            layer_farther=tables[4 + places : 4 + 2 * places],
            layer_gain_squares=tables[4 + 2 * places :],
        )
        return counts, RouteUse(
            layers=self._layers,
            num_rows=len(self._position),
            favourite=use[:, :-1],
            favourite_times=use[:, -1],
        )

    def _replayed(self, number: int) -> Int64[torch.Tensor, "valid topk"]:
        return self._ids[self._entry[number]].index_select(0, self._rows).long()

    def _places(
        self, number: int, live: Int64[torch.Tensor, "valid topk"]
    ) -> list[Int64[torch.Tensor, "valid topk"]]:
        """Return the routes to look up: own, next and last token, live before, other layers."""
        mine = self._replayed(number)
        found = [mine, *(_moved(mine, distance) for _, distance in TOKEN_PLACES), _moved(live, -1)]
        for _, distance in LAYER_PLACES:
            if 0 <= number + distance < len(self._layers):
                found.append(self._replayed(number + distance))
            else:
                found.append(mine)
        return found

    def _others(
        self, mine: Int64[torch.Tensor, "valid topk"], live: Int64[torch.Tensor, "valid topk"]
    ) -> Int64[torch.Tensor, " valid"]:
        """Return the slots that live routes share with all replayed ones of their samples.

        A live expert meets as many of them as the expert occurs in, so that a table of uses says it
        without any pairs.
        """
        start = self._table_start[:, None]
        used = torch.zeros(
            len(self._num_rows) * self._num_experts, dtype=torch.int64, device=live.device
        )
        at = (mine + start).flatten()
        used.scatter_add_(0, at, torch.ones_like(at))
        return used.take(live + start).sum(1)

    def _favourite(self, live: Int64[torch.Tensor, "valid topk"]) -> Int64[torch.Tensor, " topk"]:
        """Return the experts chosen most often; where one set dominates, it is this set."""
        flat = live.flatten()
        times = torch.zeros(self._num_experts, dtype=torch.int64, device=live.device)
        times.scatter_add_(0, flat, torch.ones_like(flat))
        return times.topk(self._topk).indices.sort().values

    def _gains(
        self, shared: Int32[torch.Tensor, "some looked_up"], here: slice
    ) -> Int32[torch.Tensor, "places some"]:
        """Return ``other - own`` at each place, 0 where a row has no such place."""
        gains = torch.zeros((_NUM_PLACES, len(shared)), dtype=torch.int32, device=shared.device)
        has = {1: slice(here.start + 1, here.stop + 1), -1: here}
        for column, (place, distance) in enumerate(TOKEN_PLACES, start=1):
            held = self._follows[has[distance]]
            gains[place] = (shared[:, column] - shared[:, 0]) * held
        # At the first and the last layer the route itself was looked up once more, and nothing is
        # gained.
        for column, (place, _) in enumerate(LAYER_PLACES, start=4):
            gains[place] = shared[:, column] - shared[:, 0]
        return gains

    def _add_rows(
        self,
        shared: Int32[torch.Tensor, "some looked_up"],
        met: Int64[torch.Tensor, " some"],
        gains: Int32[torch.Tensor, "places some"],
        looked_up: list[torch.Tensor],
        here: slice,
        values: Int64[torch.Tensor, "values valid"],
    ) -> None:
        """Add some rows of a layer to the sums by row; ``values`` is for the sums by sample."""
        own = shared[:, 0]
        parts = values[:, here]
        parts[0], parts[1], parts[2], parts[3] = own, met - own, own < self._topk, own * own
        nearer, farther = gains.clamp(min=0), (-gains).clamp(min=0)
        parts[4 : 4 + _NUM_PLACES], parts[4 + _NUM_PLACES : 4 + 2 * _NUM_PLACES] = nearer, farther
        parts[4 + 2 * _NUM_PLACES :] = gains * gains
        sums = self._row_sums[:, here]
        sums[:3] += parts[:3]
        sums[3:_SAME_LIVE] += parts[4 : 4 + 2 * _NUM_PLACES]
        sums[_SAME_LIVE] += shared[:, 3] == self._topk
        mine, before = looked_up[0][here], looked_up[2][here]
        # Ids of a route are all different, so that equal sets have topk equal pairs.
        pairs = (mine[:, :, None] == before[:, None, :]).flatten(1).sum(1)
        sums[_SAME_REPLAYED] += pairs == self._topk

    def _send(self) -> None:
        """Start what the host needs on its way, 31 bytes a row, and let go of the rest."""
        sums, num_layers = self._row_sums, len(self._layers)
        repeats = (
            self._follows[:-1]
            & (sums[_SAME_REPLAYED] == num_layers)
            & (sums[_SAME_LIVE] < num_layers)
        )
        small = torch.cat([sums[:1], sums[2:_SAME_LIVE]]).to(torch.int16)
        given = small, sums[1].clone(), repeats, self._sample_sums, self._use
        self._down = tuple(Download(tensor) for tensor in given)
        del self._ids, self._rows, self._row_sums, self._sample_sums, self._use
        del self._table_start, self._follows, self._bounds


def _moved(
    ids: Int64[torch.Tensor, "rows topk"], distance: int
) -> Int64[torch.Tensor, "rows topk"]:
    """Return the ids of the next (1) or last (-1) row for each row; at the end, the row's own."""
    return torch.cat([ids[1:], ids[-1:]] if distance == 1 else [ids[:1], ids[:-1]])


def _wrapped_overlap(
    chosen: UInt8[torch.Tensor, "rows experts"], ids: Int64[torch.Tensor, "rows topk"]
) -> Int64[torch.Tensor, " rows"]:
    """Return the slots shared modulo 256; a replayed id above 255 shares none."""
    wrapped = chosen[:, :WRAP].clone()
    for part in chosen[:, WRAP:].split(WRAP, dim=1):
        wrapped[:, : part.shape[1]] |= part
    narrow = ids < WRAP
    return (wrapped.gather(1, ids * narrow) * narrow).sum(1)


def _sums_between(
    values: Int64[torch.Tensor, "values rows"], bounds: Int64[torch.Tensor, " bounds"]
) -> Int64[torch.Tensor, "values stretches"]:
    """Return the sums of the rows between neighbouring ``bounds``: exact, in whatever order."""
    totals = torch.nn.functional.pad(values.cumsum(1), (1, 0))
    return totals.index_select(1, bounds).diff(dim=1)
