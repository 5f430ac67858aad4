"""What explains routes that disagree with the router: every known misalignment, tried on the same rows.

A hypothesis says where the right route of a row really lies: in a neighbouring row, in another layer's entry, in
another sample, under other expert ids. Each is scored by the overlap of that route with the live one. Hypotheses
that choose something from the rows (an order of layers, a map of ids) choose it on one half of the rows and are
scored on the other, so that freedom to choose does not look like agreement.

In: GuardEvidence. Out: Diagnosis. Called by: guard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from jaxtyping import Bool, Float64, Int64, Integer

from moe_replay.errors import TraceError

MIN_GAIN = 0.1
"""Overlap by which a hypothesis must beat the aligned rows to be believed."""
SIGMAS = 4.0
"""Standard errors by which any difference must be clear."""
MAX_DIAGNOSED_ROWS = 512
# Hypotheses within this of the best are as good; the simplest of them, tried first, is named.
_TIE = 0.03
_TOKEN_SHIFTS = (-1, 1, -2, 2)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GuardEvidence:
    """Live routes of a few rows of one microbatch, next to the routes that were replayed for all of its rows."""

    live_ids: Integer[np.ndarray, "sampled layers topk"]
    """``[sampled, layers, topk]``, top-k of the current weights, in any order within a row."""
    rows: Integer[np.ndarray, " sampled"]
    """``[sampled]``, local row of each entry of ``live_ids``; every one valid."""
    expert_ids: Integer[np.ndarray, "rows layers topk"]
    """``[rows, layers, topk]``, replayed ids of all local rows. Rows with ``valid=False`` hold anything."""
    valid: Bool[np.ndarray, " rows"]
    """``[rows]``, True where a route was replayed."""
    sample: Integer[np.ndarray, " rows"]
    """``[rows]``, number of the sample that the row belongs to, -1 at padding."""
    position: Integer[np.ndarray, " rows"]
    """``[rows]``, position of the token in its own sample."""
    layers: tuple[int, ...]
    """Global decoder index of each entry of the layer dim."""

    def __post_init__(self) -> None:
        sampled, rows = len(self.rows), len(self.valid)
        expected = {
            "live_ids": (self.live_ids.shape, (sampled, *self.expert_ids.shape[1:])),
            "expert_ids": (self.expert_ids.shape[:2], (rows, len(self.layers))),
            "sample": (self.sample.shape, (rows,)),
            "position": (self.position.shape, (rows,)),
        }
        for name, (got, wanted) in expected.items():
            if got != wanted:
                raise TraceError(
                    f"guard evidence: {name} has shape {got}, expected {wanted} for {rows} local rows, "
                    f"{sampled} sampled ones and layers {list(self.layers)}; hand over the arrays of one microbatch"
                )
        if not self.valid[self.rows].all():
            raise TraceError(
                f"guard evidence: {int((~self.valid[self.rows]).sum())} of {sampled} sampled rows are valid=False, "
                "expected none; nothing was replayed there, so sample rows from np.flatnonzero(valid)"
            )

    def select(self, chosen: np.ndarray) -> GuardEvidence:
        """Return the evidence of the sampled rows that ``chosen`` (a mask or positions) picks."""
        return GuardEvidence(
            live_ids=self.live_ids[chosen],
            rows=self.rows[chosen],
            expert_ids=self.expert_ids,
            valid=self.valid,
            sample=self.sample,
            position=self.position,
            layers=self.layers,
        )


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
    UNEXPLAINED = "unexplained"
    """No hypothesis explains the routes: random, of another model, or of samples held elsewhere."""


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


class Overlaps:
    """Slot overlaps between the live routes of the sampled rows and any other routes of the microbatch."""

    def __init__(self, evidence: GuardEvidence, num_experts: int) -> None:
        self.evidence = evidence
        self.num_experts = num_experts
        sampled, layers, _ = evidence.live_ids.shape
        self.live = np.zeros((sampled, layers, num_experts), dtype=bool)
        np.put_along_axis(self.live, evidence.live_ids.astype(np.int64), True, axis=2)
        self.ids = evidence.expert_ids[evidence.rows].astype(np.int64)
        self.sample = evidence.sample[evidence.rows]
        self.position = evidence.position[evidence.rows].astype(np.int64)
        self.samples = np.unique(evidence.sample[evidence.valid])
        self._place = self._table()
        self.aligned = self.of_ids(self.ids)

    def of_ids(
        self, ids: Int64[np.ndarray, "sampled layers topk"]
    ) -> Float64[np.ndarray, "sampled layers"]:
        """Return ``|live & ids| / topk``."""
        return np.take_along_axis(self.live, ids, axis=2).mean(axis=2)

    def of_place(
        self, sample: Integer[np.ndarray, " sampled"], position: Int64[np.ndarray, " sampled"]
    ) -> Float64[np.ndarray, "sampled layers"]:
        """Return the overlap with the routes at other places; nan where no route is held for one."""
        rows = self._row_at(sample, position)
        held = rows >= 0
        ids = np.where(
            held[:, None, None], self.evidence.expert_ids[np.where(held, rows, 0)], 0
        ).astype(np.int64)
        return np.where(held[:, None], self.of_ids(ids), np.nan)

    def of_token_shift(self, shift: int) -> Float64[np.ndarray, "sampled layers"]:
        """Return the overlap with the routes that lie ``shift`` tokens later in the same sample."""
        return self.of_place(self.sample, self.position + shift)

    def of_layer_shift(self, shift: int) -> Float64[np.ndarray, "sampled layers"]:
        """Return the overlap with the routes that lie ``shift`` layer entries later; nan past the ends."""
        source = np.arange(self.ids.shape[1]) + shift
        inside = (source >= 0) & (source < self.ids.shape[1])
        found = self.of_ids(self.ids[:, np.where(inside, source, 0)])
        return np.where(inside, found, np.nan)

    def _table(self) -> Int64[np.ndarray, "samples positions"]:
        evidence = self.evidence
        rows = np.flatnonzero(evidence.valid)
        width = int(evidence.position[rows].max()) + 1 if len(rows) else 1
        table = np.full((len(self.samples), width), -1, dtype=np.int64)
        table[np.searchsorted(self.samples, evidence.sample[rows]), evidence.position[rows]] = rows
        return table

    def _row_at(
        self, sample: Integer[np.ndarray, " sampled"], position: Int64[np.ndarray, " sampled"]
    ) -> Int64[np.ndarray, " sampled"]:
        inside = (position >= 0) & (position < self._place.shape[1])
        entry = np.searchsorted(self.samples, sample)
        return np.where(inside, self._place[entry, np.where(inside, position, 0)], -1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Hypothesis:
    cause: Cause
    overlap: Float64[np.ndarray, "sampled layers"]
    sentence: str
    shift: int = 0


def row_gain(
    overlap: Float64[np.ndarray, "sampled layers"], aligned: Float64[np.ndarray, "sampled layers"]
) -> Float64[np.ndarray, " held"]:
    """Return by how much each row's overlap beats the aligned one, over the rows and layers that have both."""
    held = np.isfinite(overlap)
    count = held.sum(axis=1)
    gain = np.where(held, overlap - aligned, 0.0).sum(axis=1)
    return gain[count > 0] / count[count > 0]


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
    found = Overlaps(evidence, num_experts)
    wanted = np.isin(evidence.layers, evidence.layers if layers is None else layers)
    aligned = found.aligned[:, wanted]
    best: Diagnosis | None = None
    for hypothesis in _hypotheses(found):
        overlap = hypothesis.overlap[:, wanted]
        gain = row_gain(overlap, aligned)
        if len(gain) < 2 or gain.mean() < MIN_GAIN + SIGMAS * gain.std() / len(gain) ** 0.5:
            continue
        agreement = float(np.nanmean(overlap))
        if best is None or agreement > best.agreement + _TIE:
            best = Diagnosis(
                cause=hypothesis.cause,
                agreement=agreement,
                aligned=float(aligned.mean()),
                shift=hypothesis.shift,
                sentence=f"{hypothesis.sentence} (that explains {agreement:.0%} of the expert slots)",
            )
    return best or _without_hypothesis(found, aligned)


def _without_hypothesis(
    found: Overlaps, aligned: Float64[np.ndarray, "sampled layers"]
) -> Diagnosis:
    agreement = float(aligned.mean()) if aligned.size else float("nan")
    if agreement >= 0.5:
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


def _hypotheses(found: Overlaps) -> Iterator[_Hypothesis]:
    """Yield what could be wrong, the simplest first."""
    for shift in _TOKEN_SHIFTS:
        side = "late" if shift > 0 else "early"
        yield _Hypothesis(
            cause=Cause.TOKEN_SHIFT,
            overlap=found.of_token_shift(shift),
            shift=shift,
            sentence=f"token shift {shift:+d}: the route of token t lies in row t{shift:+d}, {abs(shift)} row(s) too "
            f"{side}; a row was {'inserted' if shift > 0 else 'dropped'} before these tokens",
        )
    yield from _layer_shifts(found)
    if len(found.samples) > 1:
        yield _swapped_samples(found)
    yield _expert_offset(found)
    if found.num_experts > 256:
        yield _expert_wrap(found)
    if len(found.evidence.layers) > 1:
        yield _layer_order(found)
    yield from _expert_maps(found)


def _layer_shifts(found: Overlaps) -> Iterator[_Hypothesis]:
    num_layers = len(found.evidence.layers)
    for shift in (-1, 1, -2, 2):
        if abs(shift) < num_layers:
            yield _Hypothesis(
                cause=Cause.LAYER_SHIFT,
                overlap=found.of_layer_shift(shift),
                shift=shift,
                sentence=f"layer shift {shift:+d}: the route of a layer lies {abs(shift)} entry(ies) too "
                f"{'late' if shift > 0 else 'early'}; dense or MTP layers were counted on one side only",
            )
    for shift in range(1, num_layers):
        ids = np.roll(found.ids, -shift, axis=1)
        yield _Hypothesis(
            cause=Cause.LAYER_SHIFT,
            overlap=found.of_ids(ids),
            shift=shift,
            sentence=f"layers rotated by {shift}: the route of layer entry l lies in entry (l+{shift}) mod {num_layers}",
        )


def _swapped_samples(found: Overlaps) -> _Hypothesis:
    scores = np.full((len(found.sample), len(found.samples)), np.nan)
    for entry, other in enumerate(found.samples):
        row = found.of_place(np.full_like(found.sample, other), found.position).mean(axis=1)
        scores[:, entry] = np.where(found.sample == other, np.nan, row)

    def choose(rows: np.ndarray) -> Int64[np.ndarray, " sampled"]:
        chosen = np.zeros(len(found.sample), dtype=np.int64)
        for own in np.unique(found.sample):
            part = scores[rows & (found.sample == own)]
            count = np.isfinite(part).sum(axis=0)
            means = np.nansum(part, axis=0) / np.maximum(count, 1)
            chosen[found.sample == own] = int(np.where(count > 0, means, -1.0).argmax())
        return chosen

    overlap = _cross_fitted(
        len(found.sample),
        lambda rows: found.of_place(found.samples[choose(rows)], found.position),
    )
    overlap[found.samples[choose(np.ones(len(found.sample), dtype=bool))] == found.sample] = np.nan
    pairs = sorted(
        {
            (int(own), int(other))
            for own, other in zip(
                found.sample,
                found.samples[choose(np.ones(len(found.sample), dtype=bool))],
                strict=True,
            )
        }
    )
    shown = ", ".join(f"{own} has the routes of {other}" for own, other in pairs[:4])
    return _Hypothesis(
        cause=Cause.SWAPPED_SAMPLES,
        overlap=overlap,
        sentence=f"swapped samples: {shown}{', ...' if len(pairs) > 4 else ''}; "
        "completions were put together in another order than their traces",
    )


def _expert_offset(found: Overlaps) -> _Hypothesis:
    apart = found.ids[..., :, None] - found.evidence.live_ids[..., None, :].astype(np.int64)
    counts = np.bincount((apart % found.num_experts).ravel(), minlength=found.num_experts)
    offset = int(counts[1:].argmax()) + 1
    signed = offset if offset <= found.num_experts // 2 else offset - found.num_experts
    return _Hypothesis(
        cause=Cause.EXPERT_OFFSET,
        overlap=found.of_ids((found.ids - offset) % found.num_experts),
        shift=signed,
        sentence=f"expert-id offset {signed:+d}: every replayed id is {abs(signed)} too {'high' if signed > 0 else 'low'}; "
        "ids were counted from 1, or from the first expert of another expert-parallel rank",
    )


def _expert_wrap(found: Overlaps) -> _Hypothesis:
    wrapped = np.zeros((*found.live.shape[:2], 256), dtype=bool)
    for start in range(0, found.num_experts, 256):
        part = found.live[..., start : start + 256]
        wrapped[..., : part.shape[2]] |= part
    narrow = bool((found.ids < 256).all())
    overlap = np.take_along_axis(wrapped, found.ids % 256, axis=2).mean(axis=2)
    return _Hypothesis(
        cause=Cause.EXPERT_WRAP,
        overlap=overlap if narrow else np.full_like(overlap, np.nan),
        sentence=f"expert ids wrapped at 256: {found.num_experts} experts were stored in 8 bits",
    )


def _layer_order(found: Overlaps) -> _Hypothesis:
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
    moved = [f"{layers[l]} has those of {layers[m]}" for l, m in enumerate(source) if l != m]
    overlap = np.where(source == np.arange(num_layers), np.nan, overlap)
    return _Hypothesis(
        cause=Cause.LAYER_ORDER,
        overlap=overlap,
        sentence=f"layers hold each other's routes: {', '.join(moved[:6])}{', ...' if len(moved) > 6 else ''}; "
        "layers were numbered or gathered in another order",
    )


def _expert_maps(found: Overlaps) -> Iterator[_Hypothesis]:
    for pooled in (True, False):
        words = "one renaming for all layers" if pooled else "a renaming for each layer"
        yield _Hypothesis(
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
