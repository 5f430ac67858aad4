"""Guard: stop training when replayed routes cannot belong to the rows that they are replayed on.

Live and replayed routes of the same row differ by drift alone: number formats of two engines, or the weight updates
since the rollout. They share 80-100 % of their expert slots. Routes of another row share what any two rows share,
K/E when experts are used evenly and far more when they are not, so nothing is judged by an absolute number:

1. *Floor.* The chance overlap of each layer is measured on the same rows: the mean overlap of a live route with
   the replayed routes of all *other* rows. `agreement_floor` lies above it. All rows together, each layer, and each
   stretch of consecutive sampled rows of one sample must not lie below the floor by `SIGMAS` standard errors.
2. *Alternatives.* Neighbouring tokens share experts, so a shift by one row can stay above the floor. Other places for
   the right route (one or two tokens away, one or two layers away, another sample) are always tried too. The guard
   fires, whatever the agreement is, when one of them fits clearly better on average, on a stretch of a sample, or
   on too large a share of the rows: a trace can go wrong in the middle.

A router that sends every token to the same experts has collapsed, and its live routes say so: there replayed and live
routes agree, chance is as high as they do, and nothing fires. An engine that never wrote a layer agrees with nobody.

Rows are pooled over checks until they suffice to decide, then forgotten, so an error that starts late is not diluted.
Where chance alone reaches 70 % (nearly all rows use the same experts) the floor cannot decide and is left out.

In: GuardEvidence. Out: Agreement, or MisalignmentError with a diagnosis.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moe_replay.errors import MisalignmentError, RecipeError
from moe_replay.routing.guard.agreement import (
    Agreement,
    GuardEvidence,
    Overlaps,
    agreement_floor,
    agreement_of,
    mean_error,
    row_gain,
)
from moe_replay.routing.guard.diagnosis import SIGMAS, diagnose
from moe_replay.routing.guard.hypotheses import MIN_GAIN, Cause, alternatives

if TYPE_CHECKING:
    from jaxtyping import Float64

_WINDOW_ROWS = 8  # sampled rows of one sample that are judged together
_STRAY_GAIN = 0.3  # overlap by which a row must fit elsewhere to count as stray
_STRAY_SHARE = (
    0.15  # share of stray rows above which not drift but a misplaced stretch is the cause
)
_LEAST_POOLED_ROWS = 256  # too few to tell a misplaced stretch from drift
_MAX_POOLED_ROWS = 8192


class Guard:
    """Checks every microbatch's evidence and raises when its routes are misaligned.

    One guard serves one model for a whole run. ``floor`` replaces the measured floor of every layer.
    """

    def __init__(self, *, num_experts: int, topk: int, floor: float | None = None) -> None:
        agreement_floor(num_experts, topk)
        if floor is not None and not 0.0 <= floor <= 1.0:
            raise RecipeError(
                f"guard floor is {floor}, expected a slot overlap from 0 to 1, or none for the measured floor"
            )
        self._num_experts = num_experts
        self._topk = topk
        self._floor = floor
        self._pools: dict[tuple[int, ...], _Pool] = {}

    def check(self, evidence: GuardEvidence, *, where: str) -> Agreement:
        """Return the agreement of ``evidence``. ``where`` (step, rank, microbatch) goes into the error.

        Raises:
            MisalignmentError: when the routes lie clearly below the floor, or clearly fit better elsewhere.
        """
        found = Overlaps(evidence, self._num_experts)
        agreement = agreement_of(found)
        if not len(evidence.rows):
            return agreement
        pool = self._pools.setdefault(evidence.layers, _Pool())
        pool.add(_Judged.of(found, agreement))
        for suspect in self._suspects(pool):
            self._refuse(suspect, evidence, where)
        if pool.num_rows >= (_LEAST_POOLED_ROWS if self._is_clear(pool) else _MAX_POOLED_ROWS):
            pool.clear()
        return agreement

    def _floors(self, chance: Float64[np.ndarray, " layers"]) -> Float64[np.ndarray, " layers"]:
        if self._floor is not None:
            return np.full(len(chance), self._floor)
        return np.array([agreement_floor(self._num_experts, self._topk, c) for c in chance])

    def _is_clear(self, pool: _Pool) -> bool:
        """Tell whether every layer lies clearly above its floor; undecidable layers count as clear."""
        overlap = pool.overlap
        low = overlap.mean(axis=0) - SIGMAS * mean_error(overlap, self._topk)
        return bool((low > self._floors(pool.chance)).all())

    def _suspects(self, pool: _Pool) -> Iterator[_Suspect]:
        """Yield what must not be, the most telling first."""
        overlap, floors, latest = pool.overlap, self._floors(pool.chance), pool.latest
        slots = overlap.shape[1] * self._topk
        everything = np.arange(len(latest))
        for name, gain in pool.gains.items():
            if _beats(gain, slots):
                yield _Suspect(what="all sampled rows", rows=everything, fits=name)
        decidable = floors > 0
        if decidable.any():
            rows = overlap[:, decidable].mean(axis=1)
            floor = float(floors[decidable].mean())
            if _is_below(rows, floor, int(decidable.sum()) * self._topk):
                yield _Suspect(what="all sampled rows", rows=everything, floor=floor)
        for entry in np.flatnonzero(decidable):
            if _is_below(overlap[:, entry], float(floors[entry]), self._topk):
                layer = latest.layers[entry]
                yield _Suspect(
                    what=f"layer {layer}",
                    rows=everything,
                    floor=float(floors[entry]),
                    layers=(layer,),
                )
        yield from self._window_suspects(latest, floors)
        for name, gain in pool.gains.items():
            share = _stray_share(gain)
            if share > 0 and (stray := np.flatnonzero(latest.gains[name] > _STRAY_GAIN)).size:
                what = f"the {share:.0%} of rows that fit better elsewhere"
                yield _Suspect(what=what, rows=stray, fits=name)

    def _window_suspects(
        self, latest: _Judged, floors: Float64[np.ndarray, " layers"]
    ) -> Iterator[_Suspect]:
        decidable = floors > 0
        some = bool(decidable.any())
        overlap = latest.overlap[:, decidable].mean(axis=1) if some else np.ones(len(latest))
        floor = float(floors[decidable].mean()) if some else 0.0
        slots, all_slots = self._topk * int(decidable.sum()), self._topk * len(floors)
        wrong = [
            window
            for window in latest.windows()
            if (some and _is_below(overlap[window], floor, slots))
            or any(_beats(gain[window], all_slots) for gain in latest.gains.values())
        ]
        if not wrong:
            return
        rows = np.unique(np.concatenate(wrong))
        places = []
        for sample in np.unique(latest.sample[rows]):
            at = latest.position[rows[latest.sample[rows] == sample]]
            places.append(f"sample {sample}, positions {at.min()}..{at.max()}")
        more = f" and {len(places) - 3} more samples" if len(places) > 3 else ""
        yield _Suspect(what="; ".join(places[:3]) + more, rows=rows, floor=floor if some else None)

    def _refuse(self, suspect: _Suspect, evidence: GuardEvidence, where: str) -> None:
        part = evidence.select(suspect.rows)
        finding = diagnose(part, num_experts=self._num_experts, layers=suspect.layers)
        chance = agreement_of(Overlaps(part, self._num_experts)).mean_chance
        floor = f" and never below {suspect.floor:.0%}" if suspect.floor is not None else ""
        cause = finding.sentence
        if finding.cause in (Cause.ALIGNED, Cause.UNEXPLAINED) and suspect.fits:
            cause = f"{suspect.fits}, which fits the rows of the last checks together better than where the routes lie"
        elif finding.cause is Cause.ALIGNED:
            cause = "not visible on the rows of this check alone, which agree; rows of the checks before did not"
        raise MisalignmentError(
            f"{where}: replayed and live routes share {finding.aligned:.1%} of their expert slots in {suspect.what} "
            f"({len(part.rows)} rows of this check; routes of other rows share {chance:.1%}), expected 80-100 %{floor}. "
            f"Likely cause: {cause}. Fix where the routes are captured, transported or laid out in the batch; lowering "
            "the guard's floor would train through the wrong experts"
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Suspect:
    what: str
    rows: np.ndarray
    fits: str | None = None
    floor: float | None = None
    layers: Sequence[int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Judged:
    """What the decision needs of one evidence; the routes themselves are not kept."""

    layers: tuple[int, ...]
    overlap: Float64[np.ndarray, "sampled layers"]
    chance: Float64[np.ndarray, " layers"]
    gains: dict[str, Float64[np.ndarray, " sampled"]]
    sample: np.ndarray
    position: np.ndarray

    @classmethod
    def of(cls, found: Overlaps, agreement: Agreement) -> _Judged:
        return cls(
            layers=found.evidence.layers,
            overlap=found.aligned,
            chance=agreement.chance,
            gains={
                other.name: row_gain(other.overlap, found.aligned) for other in alternatives(found)
            },
            sample=found.sample,
            position=found.position,
        )

    def __len__(self) -> int:
        return len(self.sample)

    def windows(self) -> Iterator[np.ndarray]:
        """Yield stretches of sampled rows of one sample, in order of position, each half overlapping the last."""
        for sample in np.unique(self.sample):
            rows = np.flatnonzero(self.sample == sample)
            rows = rows[np.argsort(self.position[rows], kind="stable")]
            last = len(rows) - _WINDOW_ROWS
            if last >= 0:
                for start in sorted({*range(0, last, _WINDOW_ROWS // 2), last}):
                    yield rows[start : start + _WINDOW_ROWS]


class _Pool:
    """Rows judged together because each check alone holds too few."""

    def __init__(self) -> None:
        self._judged: list[_Judged] = []

    def add(self, judged: _Judged) -> None:
        self._judged.append(judged)

    def clear(self) -> None:
        self._judged.clear()

    @property
    def latest(self) -> _Judged:
        return self._judged[-1]

    @property
    def num_rows(self) -> int:
        return sum(len(judged) for judged in self._judged)

    @property
    def overlap(self) -> Float64[np.ndarray, "rows layers"]:
        return np.concatenate([judged.overlap for judged in self._judged])

    @property
    def chance(self) -> Float64[np.ndarray, " layers"]:
        weights = [len(judged) for judged in self._judged]
        return np.average([judged.chance for judged in self._judged], axis=0, weights=weights)

    @property
    def gains(self) -> dict[str, Float64[np.ndarray, " rows"]]:
        """Gains of every alternative that the latest rows offer, over all rows that offered it."""
        return {
            name: np.concatenate(
                [judged.gains[name] for judged in self._judged if name in judged.gains]
            )
            for name in self.latest.gains
        }


def _is_below(overlap: Float64[np.ndarray, " rows"], floor: float, slots: int) -> bool:
    return bool(overlap.mean() + SIGMAS * mean_error(overlap, slots) < floor)


def _beats(gain: Float64[np.ndarray, " rows"], slots: int) -> bool:
    """Tell whether an alternative fits clearly better than the aligned rows do."""
    held = gain[np.isfinite(gain)]
    if len(held) < _WINDOW_ROWS:
        return False
    return bool(held.mean() > MIN_GAIN + SIGMAS * mean_error(held, slots))


def _stray_share(gain: Float64[np.ndarray, " rows"]) -> float:
    """Return the share of rows that fit elsewhere by `_STRAY_GAIN`, or 0 unless it is clearly too large for drift."""
    held = gain[np.isfinite(gain)]
    if len(held) < _WINDOW_ROWS:
        return 0.0
    share = float((held > _STRAY_GAIN).mean())
    error = (_STRAY_SHARE * (1 - _STRAY_SHARE) / len(held)) ** 0.5
    return share if share > _STRAY_SHARE + SIGMAS * error else 0.0
