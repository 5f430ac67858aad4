"""Second look: find the right routes of a suspect among all places that the given arrays offer.

Every place is scored by the paired test on the suspect's own rows: slots in which the routes there
fit better, against those in which they fit worse. It has to win clearly (nats minus ln of the
number of places tried) *and* be right: the routes there must agree with the live ones about as well
as in a healthy sample. Otherwise the right routes are not here, and the cause says which rows are
wrong. A choice from many (an order of layers, a map of ids) is made on every second row and scored
on the others, so that the choice cannot overfit the score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from moe_replay.routing.guard.counts import WRAP, wrapped_mask
from moe_replay.routing.guard.orders import order_places
from moe_replay.routing.guard.statistics import row_keys, shortfall_nats, times_met
from moe_replay.routing.guard.verdict import Finding, SecondLook

if TYPE_CHECKING:
    from jaxtyping import Bool, Float64, Int64, Integer

MAX_REACH = 512
"""Maximum distance in tokens that is searched."""
MAX_ROWS = 4096
"""Maximum rows of a suspect that are searched: its first ones, or those of the sign."""
MIN_EXPLAINED = 0.5
"""Share of the usual information that routes at another place need to count as the right ones."""
_ANCHORS = 64  # rows used to find the best distance
_MIN_ROWS = 4  # for any conclusion
_CONSTANT_ROWS = 8
_HELD_SHARE = 0.8  # of the wrong rows, to attribute them to another sample


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RouteRows:
    """Replayed and live routes of full samples, such as the microbatches with the suspects."""

    expert_ids: Integer[np.ndarray, "rows layers topk"]
    """``[rows, layers, topk]``, replayed."""
    live_ids: Integer[np.ndarray, "rows layers topk"]
    """``[rows, layers, topk]``, top-k of the current weights."""
    valid: Bool[np.ndarray, " rows"]
    """``[rows]``, True where a route was replayed."""
    sample: Integer[np.ndarray, " rows"]
    """``[rows]``, id of the sample."""
    position: Integer[np.ndarray, " rows"]
    """``[rows]``, position of the token in its sample."""
    layers: tuple[int, ...]
    """Global decoder index of each entry of the layer dim."""
    num_experts: int
    """Experts a layer."""


def look_closer(
    rows: RouteRows,
    suspects: Sequence[Finding],
    *,
    usual_information: float,
    effect: float = 2.0,
) -> dict[int, SecondLook]:
    """Search for the right routes of each suspect.

    Args:
        rows: rows of the suspects, and of samples that they may be confused with.
        suspects: findings of the guard; the search uses the rows and layer of each.
        usual_information: of the median sample, see `StepRecord.information`.
        effect: slots that act as one in the paired test, see `Baseline.effects`.
    """
    order = np.flatnonzero(rows.valid)
    order = order[np.lexsort((rows.position[order], rows.sample[order]))]
    return {
        finding.sample: _Suspect(rows, order, finding, usual_information, effect).look()
        for finding in suspects
        if (rows.sample[order] == finding.sample).sum() >= _MIN_ROWS
    }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Place:
    words: str
    shared: Float64[np.ndarray, "rows layers"]  # nan where the place gives no evidence
    tried: int = 1  # number of places of this kind


class _Suspect:
    """One sample, its live sets, and the places that are tried for it."""

    def __init__(
        self,
        rows: RouteRows,
        order: Int64[np.ndarray, " ordered"],
        finding: Finding,
        usual: float,
        effect: float,
    ) -> None:
        own = order[rows.sample[order] == finding.sample]
        self._rows, self._order, self._number = rows, order, finding.sample
        self._usual, self._effect = usual, effect
        self._every_id = rows.expert_ids[own].astype(np.int64)
        self._every_live = rows.live_ids[own].astype(np.int64)
        self._every_position = rows.position[own].astype(np.int64)
        inside = (self._every_position >= finding.first) & (self._every_position <= finding.last)
        at = np.flatnonzero(inside)
        if len(at) < _MIN_ROWS:
            at = np.arange(len(own))
        self._at = at = at[:MAX_ROWS]
        self._ids, self._position = self._every_id[at], self._every_position[at]
        self._live = self._every_live[at]
        num_rows, num_layers, self._topk = self._ids.shape
        # All layers, or only the layer of the sign.
        self._wanted = np.ones(num_layers, bool)
        if finding.layer in rows.layers:
            self._wanted = np.array(rows.layers) == finding.layer
        self._mask = np.zeros((num_rows, num_layers, rows.num_experts), bool)
        np.put_along_axis(self._mask, self._live, True, axis=2)
        self._own = self._shared(self._ids)
        both = np.concatenate([np.sort(self._ids, axis=2), np.sort(self._live, axis=2)], axis=2)
        # Equal rows of text in a loop count once, or the same few flips would count many times.
        self._once = 1 / times_met(row_keys(both.reshape(num_rows, -1)))
        used = np.zeros((num_layers, rows.num_experts))
        for layer in range(num_layers):
            used[layer] = np.bincount(self._every_id[:, layer].ravel(), minlength=rows.num_experts)
        met = (self._mask * used).sum(axis=2) - self._own
        self._chance = met / max(len(own) - 1, 1)

    def look(self) -> SecondLook:
        """Return the best place that explains the routes, or else which rows are wrong."""
        if (words := self._constant()) is not None:
            return SecondLook(cause=words)
        best = SecondLook(cause=self._wrong_rows())
        tried = list(self._places())
        price = math.log(max(1, sum(place.tried for place in tried)))
        for place in tried:
            nats = self._nats(place) - price
            if (
                nats > max(best.nats, 0.0)
                and self._information(place) >= MIN_EXPLAINED * self._usual
            ):
                best = SecondLook(place=place.words, nats=nats)
        return best

    def _shared(
        self, ids: Int64[np.ndarray, "rows layers topk"]
    ) -> Float64[np.ndarray, "rows layers"]:
        return np.take_along_axis(self._mask, ids, axis=2).sum(axis=2).astype(np.float64)

    def _nats(self, place: _Place) -> float:
        gain = (self._once[:, None] * np.nan_to_num(place.shared - self._own))[:, self._wanted]
        nearer, farther = np.maximum(gain, 0).sum(), np.maximum(-gain, 0).sum()
        return float(shortfall_nats(float(farther), float(nearer + farther), 0.5, self._effect))

    def _information(self, place: _Place) -> float:
        held = np.isfinite(place.shared) & self._wanted
        room = np.where(held, self._topk - self._chance, 0.0).sum()
        return float(np.where(held, place.shared - self._chance, 0.0).sum() / max(room, 1e-9))

    def _constant(self) -> str | None:
        ids = np.sort(self._ids, axis=2)
        live = np.sort(self._live, axis=2)
        constant = (ids == ids[:1]).all(axis=(0, 2)) & ~(live == live[:1]).all(axis=(0, 2))
        constant &= self._wanted
        if len(ids) < _CONSTANT_ROWS or not constant.any():
            return None
        layers = [layer for layer, bad in zip(self._rows.layers, constant, strict=True) if bad]
        entry = int(constant.argmax())
        return (
            f"constant fill: layers {layers} hold the same experts in all {len(ids)} rows ({ids[0, entry].tolist()} in layer "
            f"{layers[0]}), while their routers choose others; the engine never wrote them"
        )

    def _wrong_rows(self) -> str:
        """Say which rows of the sample are wrong, and which sample's routes they hold, if known."""
        own, topk = np.zeros(len(self._every_id)), self._topk
        for layer in np.flatnonzero(self._wanted):
            ids, live = self._every_id[:, layer], self._every_live[:, layer]
            own += (ids[:, :, None] == live[:, None, :]).sum(axis=(1, 2))
        chance = float(self._chance[:, self._wanted].sum(axis=1).mean())
        kept = (own - chance) / max(topk * self._wanted.sum() - chance, 1e-9)
        wrong = np.flatnonzero(kept < 0.5 * self._usual)
        if not len(wrong):
            return "no single row is wrong, and no other place fits better: drift, or other weights"
        where = self._every_position[wrong]
        of = f"{len(wrong)} of {len(kept)} rows (positions {where.min()}..{where.max()})"
        if (other := self._holder(wrong)) is not None:
            return f"{of} hold the routes of sample {other}; completions and traces were combined in different orders"
        return f"{of} fit no place that was searched: they are random, from other weights, or of a sample that was not given"

    def _holder(self, wrong: Int64[np.ndarray, " wrong"]) -> int | None:
        """Return the sample whose routes most of the ``wrong`` rows hold, at the same positions."""
        ids = np.sort(self._every_id[wrong], axis=2)
        for other, there, held in self._others(self._every_position[wrong]):
            same = (np.sort(self._rows.expert_ids[there], axis=2) == ids).all(axis=(1, 2))
            if (held & same).mean() > _HELD_SHARE:
                return other
        return None

    def _others(
        self, position: Int64[np.ndarray, " positions"]
    ) -> Iterator[tuple[int, Int64[np.ndarray, " positions"], Bool[np.ndarray, " positions"]]]:
        """Yield each other sample with its row at each ``position``, and whether it has one."""
        rows, order = self._rows, self._order
        for other in np.unique(rows.sample[order]):
            theirs = order[rows.sample[order] == other]
            place = np.searchsorted(rows.position[theirs], position)
            there = theirs[np.minimum(place, len(theirs) - 1)]
            if other != self._number:
                yield int(other), there, rows.position[there] == position

    def _places(self) -> Iterator[_Place]:
        yield from self._distances()
        yield from self._samples()
        yield from self._row_orders()
        yield from self._layer_orders()
        yield from self._offsets()
        if len(self._ids) >= 2 * _MIN_ROWS:
            yield from self._renamings()

    def _distances(self) -> Iterator[_Place]:
        """Yield the best distance, by the slots that anchor rows share with other rows."""
        count = len(self._every_id)
        anchors = np.unique(np.linspace(0, len(self._at) - 1, _ANCHORS).astype(np.int64))
        reach = min(MAX_REACH, count - 1)
        total, rows = np.zeros((2, 2 * reach + 1))
        for anchor in anchors:
            here = int(self._at[anchor])
            low, high = max(0, here - reach), min(count, here + reach + 1)
            found = self._mask[anchor][
                np.arange(self._mask.shape[1])[:, None], self._every_id[low:high]
            ]
            total[low - here + reach : high - here + reach] += found.sum(axis=(1, 2))
            rows[low - here + reach : high - here + reach] += 1
        mean = np.where(rows >= max(2, len(anchors) / 2), total / np.maximum(rows, 1), -1.0)
        mean[reach] = -1.0
        # In a short sample few distances are within reach of most anchors; +1 and -1 are always
        # tried.
        for distance in {int(mean.argmax()) - reach, 1, -1}:
            if distance and abs(distance) < count:
                yield self._distance(distance, 2 * reach)

    def _distance(self, distance: int, tried: int) -> _Place:
        source = self._at + distance
        inside = (source >= 0) & (source < len(self._every_id))
        shared = self._shared(self._every_id[np.where(inside, source, 0)])
        side = "late" if distance > 0 else "early"
        return _Place(
            words=f"token shift {distance:+d}: the routes came {abs(distance)} row(s) too {side}; rows were "
            f"{'inserted' if distance > 0 else 'dropped'} before them",
            shared=np.where(inside[:, None], shared, np.nan),
            tried=tried,
        )

    def _samples(self) -> Iterator[_Place]:
        for other, there, held in self._others(self._position):
            if not held.any():
                continue
            shared = self._shared(self._rows.expert_ids[there].astype(np.int64))
            yield _Place(
                words=f"swapped samples: its routes are in sample {other}; completions and traces were put together in "
                "different orders",
                shared=np.where(held[:, None], shared, np.nan),
            )

    def _row_orders(self) -> Iterator[_Place]:
        rows = self._rows
        for words, there, held in order_places(
            rows.sample, rows.position, rows.valid, self._number, self._position
        ):
            shared = self._shared(rows.expert_ids[there].astype(np.int64))
            yield _Place(words=words, shared=np.where(held[:, None], shared, np.nan))

    def _layer_orders(self) -> Iterator[_Place]:
        num_layers = self._ids.shape[1]
        if num_layers < 2:
            return
        for by in range(1, num_layers):
            signed = by if by <= num_layers // 2 else by - num_layers
            yield _Place(
                words=f"layers rotated by {signed:+d}: the routes of layer entry l are in entry (l{signed:+d}) mod {num_layers}; "
                "layers were gathered in another order",
                shared=self._shared(np.roll(self._ids, -by, axis=1)),
            )
        every = np.stack(
            [
                self._shared(np.repeat(self._ids[:, [source]], num_layers, axis=1))
                for source in range(num_layers)
            ],
            axis=2,
        )

        def choose(chosen: np.ndarray) -> np.ndarray:
            return every[chosen].mean(axis=0).argmax(axis=1)

        source = choose(np.ones(len(every), bool))
        moved = [
            f"{self._rows.layers[at]} has those of {self._rows.layers[m]}"
            for at, m in enumerate(source)
            if at != m
        ]
        if not moved:
            return
        shared = self._cross_fitted(lambda rows: every[:, np.arange(num_layers), choose(rows)])
        yield _Place(
            words=f"layers hold each other's routes: {', '.join(moved[:6])}{', ...' if len(moved) > 6 else ''}; layers were "
            "numbered or gathered in another order",
            # Layers that stay in position give no evidence.
            shared=np.where(source == np.arange(num_layers), np.nan, shared),
        )

    def _offsets(self) -> Iterator[_Place]:
        experts = self._rows.num_experts
        apart = (self._ids[..., :, None] - self._live[..., None, :]) % experts
        counts = np.bincount(apart.ravel(), minlength=experts)
        offset = int(counts[1:].argmax()) + 1
        signed = offset if offset <= experts // 2 else offset - experts
        yield _Place(
            words=f"expert-id offset {signed:+d}: every id is {abs(signed)} too {'high' if signed > 0 else 'low'}; ids were counted "
            "from 1, or from the first expert of another expert-parallel rank",
            shared=self._shared((self._ids - offset) % experts),
            tried=experts,
        )
        if experts > WRAP and (self._ids < WRAP).all():
            yield _Place(
                words=f"expert-id wrap: {experts} experts were stored in 8 bits",
                shared=np.take_along_axis(wrapped_mask(self._mask), self._ids, axis=2)
                .sum(axis=2)
                .astype(float),
            )

    def _renamings(self) -> Iterator[_Place]:
        for pooled in (True, False):
            words = "one renaming for all layers" if pooled else "a renaming for each layer"
            yield _Place(
                words=f"wrong expert-id space: {words} explains the ids, such as physical instead of logical ids under "
                "expert load balancing",
                shared=self._cross_fitted(lambda rows, pooled=pooled: self._renamed(rows, pooled)),
            )

    def _renamed(
        self, rows: Bool[np.ndarray, " rows"], pooled: bool
    ) -> Float64[np.ndarray, "rows layers"]:
        """Fit a one-to-one map of ids on ``rows``, and return what all rows share under it."""
        experts, ids = self._rows.num_experts, np.empty_like(self._ids)
        together = np.zeros((experts, experts))
        for layer in range(ids.shape[1]):
            held = np.zeros((int(rows.sum()), experts))
            np.put_along_axis(held, self._ids[rows, layer], 1.0, axis=1)
            live = self._mask[rows, layer].astype(np.float64)
            # Lift, not count: an always active expert occurs with every other.
            lift = held.T @ live - held.sum(axis=0)[:, None] * live.mean(axis=0)
            together += lift
            if not pooled:
                ids[:, layer] = _matching(lift)[self._ids[:, layer]]
        return self._shared(_matching(together)[self._ids] if pooled else ids)

    def _cross_fitted(
        self, fit: Callable[[np.ndarray], Float64[np.ndarray, "rows layers"]]
    ) -> Float64[np.ndarray, "rows layers"]:
        """Score every row with the choice made on the other half of the rows."""
        even = np.arange(len(self._ids)) % 2 == 0
        return np.where(even[:, None], fit(~even), fit(even))


def _matching(lift: Float64[np.ndarray, "replayed live"]) -> Int64[np.ndarray, " replayed"]:
    """Return a one-to-one map by fixing pairs that prefer each other until none are left."""
    lift = lift.copy()
    partner = np.full(len(lift), -1, dtype=np.int64)
    everyone = np.arange(len(lift))
    while (partner < 0).any():
        choice, back = lift.argmax(axis=1), lift.argmax(axis=0)
        mutual = (partner < 0) & (back[choice] == everyone) & (lift[everyone, choice] > 0)
        if not mutual.any():
            # The rest occurs together only by chance, so any map works.
            partner[partner < 0] = np.setdiff1d(everyone, partner)
            break
        partner[mutual] = choice[mutual]
        lift[mutual] = -np.inf
        lift[:, choice[mutual]] = -np.inf
    return partner


def with_rho(look: SecondLook, *, replayed_k3: float, live_k3: float) -> SecondLook:
    """Return the look with ln(k3 under replay / k3 with live routing) of the suspect."""
    return replace(look, rho=math.log(max(replayed_k3, 1e-12) / max(live_k3, 1e-12)))
