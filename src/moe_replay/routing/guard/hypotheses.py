"""Hypotheses about misaligned routes: where the right route of a row really lies, were one of them true.

It may lie in a neighbouring row or further off, in another layer's entry, in another sample, or under other expert ids.
Each hypothesis is scored by the overlap of that route with the live one. Those that choose something from the rows (a
distance, an order of layers, a map of ids) choose it on one half of the rows and are scored on the other, so that freedom
to choose does not look like agreement.

In: Overlaps. Out: Hypothesis. Called by: diagnosis, guard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from moe_replay.routing.guard.agreement import Overlaps

if TYPE_CHECKING:
    from jaxtyping import Bool, Float64, Int64

MIN_GAIN = 0.1
"""Overlap by which a hypothesis must beat the aligned rows to be believed."""
_LEAST_ROWS_TO_CHOOSE = 8
_TOKEN_SHIFTS = (-1, 1, -2, 2)
_LAYER_SHIFTS = (-1, 1, -2, 2)
_ROWS_TO_SEARCH = 64  # of each half, over all samples, when every distance is tried
_LEAST_ROWS_A_DISTANCE = 3


class Cause(StrEnum):
    """What explains the disagreement."""

    ALIGNED = "aligned"
    """The routes lie where they belong; whatever differs is drift."""
    TOKEN_SHIFT = "token shift"
    """Routes lie some rows before or after their tokens."""
    LAYER_SHIFT = "layer shift"
    """Routes lie some entries before or after their layers, or are rotated over the layers."""
    SWAPPED_SAMPLES = "swapped samples"
    """Routes belong to other samples, at the same positions."""
    EXPERT_OFFSET = "expert-id offset"
    """Ids are off by a constant."""
    EXPERT_WRAP = "expert-id wrap"
    """Ids were narrowed to 8 bits."""
    LAYER_ORDER = "layer order"
    """Layers hold each other's routes, in no constant distance."""
    EXPERT_IDS = "expert-id space"
    """Ids are consistently renamed, such as physical ids under expert load balancing."""
    CONSTANT_FILL = "constant fill"
    """Layers hold one set of experts for all tokens, which their routers do not choose: nobody wrote them."""
    UNEXPLAINED = "unexplained"
    """No hypothesis explains the routes: random, of another model, or of samples held elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Hypothesis:
    """Where the right routes may lie, and the overlap of those with the live ones."""

    cause: Cause
    """The misalignment, were it true."""
    overlap: Float64[np.ndarray, "sampled layers"]
    """``[sampled, layers]``; nan where the hypothesis says nothing."""
    sentence: str
    """The hypothesis in words."""
    shift: int = 0
    """Rows, layer entries or ids off, where the cause has such a number."""

    @property
    def name(self) -> str:
        """The cause with its shift, such as ``token shift +1``."""
        return f"{self.cause} {self.shift:+d}" if self.shift else str(self.cause)


def alternatives(found: Overlaps) -> Iterator[Hypothesis]:
    """Yield the hypotheses that are cheap enough to be tried on every check, the simplest first."""
    for shift in _TOKEN_SHIFTS:
        side = "late" if shift > 0 else "early"
        yield Hypothesis(
            cause=Cause.TOKEN_SHIFT,
            overlap=found.of_token_shift(shift),
            shift=shift,
            sentence=f"token shift {shift:+d}: the route of token t lies in row t{shift:+d}, {abs(shift)} row(s) too "
            f"{side}; a row was {'inserted' if shift > 0 else 'dropped'} before these tokens",
        )
    for shift in _LAYER_SHIFTS:
        if abs(shift) < len(found.evidence.layers):
            yield _layer_shift(found, shift)
    if len(found.samples) > 1:
        yield _swapped_samples(found)


def rarities(found: Overlaps) -> Iterator[Hypothesis]:
    """Yield the hypotheses that are tried only once something is wrong."""
    if len(found.sample) >= _LEAST_ROWS_TO_CHOOSE:
        yield _far_token_shift(found)
    yield _expert_offset(found)
    if found.num_experts > 256:
        yield _expert_wrap(found)
    num_layers = len(found.evidence.layers)
    for shift in range(3, num_layers - 2):
        yield Hypothesis(
            cause=Cause.LAYER_SHIFT,
            overlap=found.of_ids(np.roll(found.ids, -shift, axis=1)),
            shift=shift,
            sentence=f"layers rotated by {shift}: the route of layer entry l lies in entry (l+{shift}) mod {num_layers}",
        )
    if len(found.sample) >= _LEAST_ROWS_TO_CHOOSE:
        if num_layers > 1:
            yield _layer_order(found)
        yield from _expert_maps(found)


def _layer_shift(found: Overlaps, shift: int) -> Hypothesis:
    """Shift by a few layer entries; a rotation when the entries that wrap around are explained as well."""
    num_layers = len(found.evidence.layers)
    inside = found.of_layer_shift(shift)
    rotated = found.of_ids(np.roll(found.ids, -shift, axis=1))
    wraps = ~np.isfinite(inside).any(axis=0)
    if (rotated - found.aligned)[:, wraps].mean() > MIN_GAIN:
        sentence = (
            f"layers rotated by {shift:+d}: the route of layer entry l lies in entry (l{shift:+d}) mod {num_layers}; "
            "layers were gathered in another order"
        )
        return Hypothesis(cause=Cause.LAYER_SHIFT, overlap=rotated, shift=shift, sentence=sentence)
    sentence = (
        f"layer shift {shift:+d}: the route of a layer lies {abs(shift)} layer entry(ies) too "
        f"{'late' if shift > 0 else 'early'}; dense or MTP layers were counted on one side only"
    )
    return Hypothesis(cause=Cause.LAYER_SHIFT, overlap=inside, shift=shift, sentence=sentence)


def _swapped_samples(found: Overlaps) -> Hypothesis:
    """Let each sample choose whose routes it holds; its own choice makes a row irrelevant to the hypothesis."""
    own = np.searchsorted(found.samples, found.sample)
    scores = np.stack(
        [
            found.of_place(np.full_like(found.sample, other), found.position).mean(axis=1)
            for other in found.samples
        ],
        axis=1,
    )

    def choose(rows: np.ndarray) -> Int64[np.ndarray, " sampled"]:
        chosen = own.copy()
        for entry in np.unique(own):
            part = scores[rows & (own == entry)]
            count = np.isfinite(part).sum(axis=0)
            if count[entry]:
                means = np.nansum(part, axis=0) / np.maximum(count, 1)
                chosen[own == entry] = int(np.where(count > 0, means, -1.0).argmax())
        return chosen

    def fit(rows: np.ndarray) -> Float64[np.ndarray, "sampled layers"]:
        chosen = choose(rows)
        overlap = found.of_place(found.samples[chosen], found.position)
        return np.where((chosen == own)[:, None], np.nan, overlap)

    chosen = choose(np.ones(len(own), dtype=bool))
    pairs = sorted({(int(a), int(b)) for a, b in zip(own, chosen, strict=True) if a != b})
    shown = [f"sample {found.samples[a]} has the routes of {found.samples[b]}" for a, b in pairs]
    return Hypothesis(
        cause=Cause.SWAPPED_SAMPLES,
        overlap=_cross_fitted(len(own), fit),
        sentence=f"swapped samples: {', '.join(shown[:4])}{', ...' if len(shown) > 4 else ''}; "
        "completions and their traces were put together in different orders",
    )


def _far_token_shift(found: Overlaps) -> Hypothesis:
    """Let each sample choose how far off its routes lie; a distance of none makes its rows irrelevant."""
    own = np.searchsorted(found.samples, found.sample)
    searched = {row: found.along_sample(row) for row in _spread_rows(own)}

    def choose(rows: Bool[np.ndarray, " sampled"]) -> Int64[np.ndarray, " samples"]:
        chosen = np.zeros(len(found.samples), dtype=np.int64)
        for entry in range(len(found.samples)):
            held = [row for row in searched if rows[row] and own[row] == entry]
            chosen[entry] = _best_distance([(int(found.position[r]), searched[r]) for r in held])
        return chosen

    def fit(rows: Bool[np.ndarray, " sampled"]) -> Float64[np.ndarray, "sampled layers"]:
        distance = choose(rows)[own]
        overlap = found.of_place(found.sample, found.position + distance)
        return np.where(distance[:, None] == 0, np.nan, overlap)

    chosen = choose(np.ones(len(own), dtype=bool))
    moved = {int(s): int(by) for s, by in zip(found.samples, chosen, strict=True) if by}
    shifts = sorted(set(moved.values()))
    shift = shifts[0] if len(shifts) == 1 else 0
    each = ", ".join(f"{by:+d} in sample {number}" for number, by in list(moved.items())[:4])
    return Hypothesis(
        cause=Cause.TOKEN_SHIFT,
        overlap=_cross_fitted(len(own), fit),
        shift=shift,
        sentence=f"token shift {f'{shift:+d}' if shift else 'by sample'}: the route of a token lies that many rows later: "
        f"{each}{', ...' if len(moved) > 4 else ''}; the routes of a prompt were left out or counted twice, or padding was "
        "counted on one side only",
    )


def _spread_rows(own: Int64[np.ndarray, " sampled"]) -> list[int]:
    """Return rows of every sample, as many of both halves."""
    entries = np.unique(own)
    per_sample = max(_LEAST_ROWS_TO_CHOOSE, _ROWS_TO_SEARCH // len(entries))
    chosen: list[int] = []
    for entry in entries:
        for half in (0, 1):
            rows = np.flatnonzero((own == entry) & (np.arange(len(own)) % 2 == half))
            step = max(1, -(-len(rows) // per_sample))
            chosen += rows[::step].tolist()
    return chosen


def _best_distance(rows: list[tuple[int, Float64[np.ndarray, " positions"]]]) -> int:
    """Return the distance at which the rows (position, overlap with every position) agree best; 0 when too few say so."""
    if not rows:
        return 0
    width = len(rows[0][1])
    total, count = np.zeros(2 * width - 1), np.zeros(2 * width - 1)
    for position, overlap in rows:
        held = np.isfinite(overlap)
        places = np.flatnonzero(held) - position + width - 1
        total[places] += overlap[held]
        count[places] += 1
    enough = count >= max(_LEAST_ROWS_A_DISTANCE, len(rows) / 2)
    means = np.where(enough, total / np.maximum(count, 1), -1.0)
    return int(means.argmax()) - width + 1 if enough.any() else 0


def _expert_offset(found: Overlaps) -> Hypothesis:
    apart = found.ids[..., :, None] - found.evidence.live_ids[..., None, :].astype(np.int64)
    counts = np.bincount((apart % found.num_experts).ravel(), minlength=found.num_experts)
    offset = int(counts[1:].argmax()) + 1
    signed = offset if offset <= found.num_experts // 2 else offset - found.num_experts
    return Hypothesis(
        cause=Cause.EXPERT_OFFSET,
        overlap=found.of_ids((found.ids - offset) % found.num_experts),
        shift=signed,
        sentence=f"expert-id offset {signed:+d}: every replayed id is {abs(signed)} too {'high' if signed > 0 else 'low'}; "
        "ids were counted from 1, or from the first expert of another expert-parallel rank",
    )


def _expert_wrap(found: Overlaps) -> Hypothesis:
    wrapped = np.zeros((*found.live.shape[:2], 256), dtype=bool)
    for start in range(0, found.num_experts, 256):
        part = found.live[..., start : start + 256]
        wrapped[..., : part.shape[2]] |= part
    narrow = bool((found.ids < 256).all())
    overlap = np.take_along_axis(wrapped, found.ids % 256, axis=2).mean(axis=2)
    return Hypothesis(
        cause=Cause.EXPERT_WRAP,
        overlap=overlap if narrow else np.full_like(overlap, np.nan),
        sentence=f"expert ids wrapped at 256: {found.num_experts} experts were stored in 8 bits",
    )


def _layer_order(found: Overlaps) -> Hypothesis:
    num_layers = len(found.evidence.layers)
    every = np.stack(
        [found.of_ids(np.repeat(found.ids[:, [m]], num_layers, axis=1)) for m in range(num_layers)],
        axis=2,
    )

    def choose(rows: np.ndarray) -> Int64[np.ndarray, " layers"]:
        return every[rows].mean(axis=0).argmax(axis=1)

    overlap = _cross_fitted(
        len(found.sample), lambda rows: every[:, np.arange(num_layers), choose(rows)]
    )
    layers = found.evidence.layers
    source = choose(np.ones(len(found.sample), dtype=bool))
    moved = [f"{layers[at]} has those of {layers[m]}" for at, m in enumerate(source) if at != m]
    overlap = np.where(source == np.arange(num_layers), np.nan, overlap)
    return Hypothesis(
        cause=Cause.LAYER_ORDER,
        overlap=overlap,
        sentence=f"layers hold each other's routes: {', '.join(moved[:6])}{', ...' if len(moved) > 6 else ''}; "
        "layers were numbered or gathered in another order",
    )


def _expert_maps(found: Overlaps) -> Iterator[Hypothesis]:
    for pooled in (True, False):
        words = "one renaming for all layers" if pooled else "a renaming for each layer"
        yield Hypothesis(
            cause=Cause.EXPERT_IDS,
            overlap=_cross_fitted(
                len(found.sample), lambda rows, pooled=pooled: _renamed(found, rows, pooled=pooled)
            ),
            sentence=f"wrong expert-id space: {words} explains the ids, such as physical ids under expert load "
            "balancing in place of logical ones",
        )


def _renamed(
    found: Overlaps, rows: np.ndarray, *, pooled: bool
) -> Float64[np.ndarray, "sampled layers"]:
    """Fit a one-to-one map of replayed to live ids on ``rows`` and return the overlap of all rows under it."""
    experts, num_layers = found.num_experts, found.ids.shape[1]
    ids = np.empty_like(found.ids)
    together = np.zeros((experts, experts))
    for layer in range(num_layers):
        held = np.zeros((int(rows.sum()), experts))
        np.put_along_axis(held, found.ids[rows, layer], 1.0, axis=1)
        live = found.live[rows, layer].astype(np.float64)
        # Lift, not count: an expert that is always on occurs with every other.
        lift = held.T @ live - held.sum(axis=0)[:, None] * live.mean(axis=0)
        together += lift
        if not pooled:
            ids[:, layer] = _matching(lift)[found.ids[:, layer]]
    return found.of_ids(_matching(together)[found.ids] if pooled else ids)


def _matching(lift: Float64[np.ndarray, "replayed live"]) -> Int64[np.ndarray, " replayed"]:
    """Return a one-to-one map by fixing pairs that prefer each other until none are left."""
    lift = lift.copy()
    count = len(lift)
    partner = np.full(count, -1, dtype=np.int64)
    everyone = np.arange(count)
    while (partner < 0).any():
        choice, back = lift.argmax(axis=1), lift.argmax(axis=0)
        mutual = (partner < 0) & (back[choice] == everyone)
        partner[mutual] = choice[mutual]
        lift[mutual] = -np.inf
        lift[:, choice[mutual]] = -np.inf
    return partner


def _cross_fitted(
    count: int, fit: Callable[[np.ndarray], Float64[np.ndarray, "sampled layers"]]
) -> Float64[np.ndarray, "sampled layers"]:
    """Score every row by the choice that the other half of the rows makes."""
    even = np.arange(count) % 2 == 0
    return np.where(even[:, None], fit(~even), fit(even))
