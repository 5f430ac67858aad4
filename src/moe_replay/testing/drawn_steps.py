"""Whole steps of routes with the habits of real ones, and misalignments planted into them.

Tokens remember their predecessor, samples of a prompt share a topic, some experts are popular, and
drift comes in bursts and differs between samples with a long tail. `DrawnSteps` draws such steps;
`planted` spoils them.

In: shapes and a generator. Out: replayed and live expert ids by (sample, row, layer, slot).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int64

from moe_replay.routing.guard import OverlapCounts, count_overlaps

MAX_HEAT = 6.0
"""Scale of the drift at which almost nothing of a route remains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnSteps:
    """A source of steps whose drift is scaled so that the median sample reaches ``agreement``."""

    num_experts: int
    """Experts a layer."""
    topk: int
    """Experts a token."""
    num_layers: int
    """Layers."""
    num_rows: int
    """Rows of each sample."""
    num_samples: int = 32
    """Samples of a step."""
    group: int = 4
    """Samples of one prompt."""
    agreement: float = 0.92
    """Share of the slots on which live and recorded routes of the median sample agree."""
    spread: float = 0.15
    """How far samples differ in drift: 0.15 as measured on real models, 0.35 a long tail."""
    popularity: float = 1.0
    """Zipf exponent of the experts' use; 0 is even, 8 a collapsed router."""
    memory: tuple[float, float] = (0.3, 0.7)
    """Correlation of neighbouring tokens, of the first to the last sample."""
    topic: float = 0.7
    """Strength of what the tokens of a sample have in common."""

    def heat(self, rng: np.random.Generator) -> float:
        """Return the scale of the drift at which the median sample reaches ``agreement``."""
        samples, rows = 12, min(self.num_rows, 30)
        scores, uneven = self._scores(rng, samples, rows), self._uneven(rng, samples, rows)
        recorded = top_ids(scores, self.topk)[..., None, :]
        low, high = 0.0, MAX_HEAT
        for _ in range(9):
            middle = (low + high) / 2
            live = self._drifted(scores, middle * uneven / np.median(uneven), rng)
            agreed = np.median((live[..., None] == recorded).any(axis=3).mean(axis=(1, 2)))
            low, high = (middle, high) if agreed > self.agreement else (low, middle)
        return (low + high) / 2

    def draw(
        self, rng: np.random.Generator, heat: float
    ) -> tuple[
        Int64[np.ndarray, "samples rows layers topk"], Int64[np.ndarray, "samples rows layers topk"]
    ]:
        """Return recorded and live ids of one step."""
        uneven = heat * self._uneven(rng, self.num_samples, self.num_rows)
        recorded, live = [], []
        for _ in range(self.num_layers):
            scores = self._scores(rng, self.num_samples, self.num_rows)
            recorded.append(top_ids(scores, self.topk))
            live.append(self._drifted(scores, uneven, rng))
        return np.stack(recorded, axis=2), np.stack(live, axis=2)

    def count(
        self,
        replayed: Int64[np.ndarray, "samples rows layers topk"],
        live: Int64[np.ndarray, "samples rows layers topk"],
        *,
        first_sample: int = 0,
        positions: Int64[np.ndarray, " rows"] | None = None,
    ) -> OverlapCounts:
        """Return the counts of one rank that holds the rows at ``positions`` of each sample."""
        samples, rows = replayed.shape[:2]
        return count_overlaps(
            replayed.reshape(samples * rows, *replayed.shape[2:]),
            live.reshape(samples * rows, *live.shape[2:]),
            valid=np.ones(samples * rows, bool),
            sample=np.repeat(np.arange(first_sample, first_sample + samples), rows),
            position=np.tile(np.arange(rows) if positions is None else positions, samples),
            layers=tuple(range(replayed.shape[2])),
            num_experts=self.num_experts,
        )

    def gaps(self, rng: np.random.Generator) -> dict[int, float]:
        """Return the mean k3 of healthy samples: Student-t tokens, samples that differ."""
        scale = 0.02 * np.exp(0.5 * rng.standard_t(4, (self.num_samples, 1)))
        ratio = np.clip(scale * rng.standard_t(2.5, (self.num_samples, self.num_rows)), -8, 8)
        k3 = (np.exp(ratio) - 1 - ratio).mean(axis=1)
        return {sample: float(value) for sample, value in enumerate(k3)}

    def _scores(
        self, rng: np.random.Generator, samples: int, rows: int
    ) -> Float[np.ndarray, "samples rows experts"]:
        walk = rng.standard_normal((rows, samples, self.num_experts), dtype=np.float32)
        memory = np.linspace(*self.memory, samples).astype(np.float32)[:, None]
        for row in range(1, rows):
            walk[row] = memory * walk[row - 1] + np.sqrt(1 - memory**2) * walk[row]
        groups = rng.standard_normal((-(-samples // self.group), self.num_experts))
        topic = groups.repeat(self.group, axis=0)[:samples]
        topic = topic + rng.standard_normal((samples, self.num_experts))
        popular = rng.permutation(-np.log(np.arange(1, self.num_experts + 1)))
        shared = (self.topic * topic + self.popularity * popular).astype(np.float32)
        return (1.5 * walk + shared).swapaxes(0, 1)

    def _uneven(
        self, rng: np.random.Generator, samples: int, rows: int
    ) -> Float[np.ndarray, "samples rows 1"]:
        bursts = rng.standard_normal((rows, samples))
        for row in range(1, rows):
            bursts[row] = 0.7 * bursts[row - 1] + 0.71 * bursts[row]
        sample = np.minimum(self.spread * rng.standard_t(4, (samples, 1)), 1.5)
        return np.exp(0.5 * bursts.T + sample).astype(np.float32)[..., None]

    def _drifted(
        self, scores: np.ndarray, heat: np.ndarray, rng: np.random.Generator
    ) -> Int64[np.ndarray, "samples rows topk"]:
        noise = rng.standard_normal(scores.shape, dtype=np.float32)
        return top_ids(scores + heat.astype(np.float32) * noise, self.topk)


def top_ids(scores: Float[np.ndarray, "*any experts"], topk: int) -> Int64[np.ndarray, "*any topk"]:
    """Return the ids of the largest scores, in no order."""
    return np.argpartition(-scores, topk - 1, axis=-1)[..., :topk].astype(np.int64)


def planted(
    recorded: Int64[np.ndarray, "samples rows layers topk"],
    *,
    num_experts: int,
    group: int,
    rng: np.random.Generator,
) -> dict[str, Callable[[], Int64[np.ndarray, "samples rows layers topk"]]]:
    """Return each misalignment by name, with what the replayed routes are if every sample has it.

    A test takes one sample of it, some, or all.
    """
    samples, rows, layers, topk = recorded.shape
    at = np.broadcast_to(np.arange(rows), (samples, rows))
    middle = layers // 2
    stale = min(60, max(4, rows // 8))

    def rows_of(
        chosen: Bool[np.ndarray, "samples rows"], other: np.ndarray
    ) -> Int64[np.ndarray, "samples rows layers topk"]:
        return np.where(chosen[..., None, None], other, recorded)

    def late(by: int) -> np.ndarray:
        return np.roll(recorded, by, axis=1)

    def anything() -> np.ndarray:
        return top_ids(rng.random((*recorded.shape[:3], num_experts), dtype=np.float32), topk)

    def in_layer(ids: np.ndarray) -> np.ndarray:
        changed = recorded.copy()
        changed[:, :, middle] = ids
        return changed

    strewn = rng.random((samples, rows)).argsort(axis=1) < max(1, rows // 10)
    stretch = (at >= rows // 2) & (at < rows // 2 + stale)
    found: dict[str, Callable[[], np.ndarray]] = {
        "one row late": lambda: late(1),
        "one row early": lambda: late(-1),
        "two rows late": lambda: late(2),
        "a quarter of the rows late": lambda: late(max(3, rows // 4)),
        "another sample of the prompt": lambda: recorded[np.arange(samples) ^ 1],
        "another prompt": lambda: np.roll(recorded, group, axis=0),
        "random": anything,
        "second half random": lambda: rows_of(at >= rows // 2, anything()),
        "last quarter one row late": lambda: rows_of(at >= rows * 3 // 4, late(1)),
        "a tenth of the rows random": lambda: rows_of(strewn, anything()),
        "stale stretch": lambda: rows_of(
            stretch, np.repeat(recorded[:, [rows // 2]], rows, axis=1)
        ),
        "one layer one row late": lambda: in_layer(late(1)[:, :, middle]),
        "one layer its neighbour's": lambda: in_layer(recorded[:, :, middle - 1]),
        "one layer random": lambda: in_layer(anything()[:, :, middle]),
        "layers rotated": lambda: np.roll(recorded, 1, axis=2),
        "ids + 1": lambda: (recorded + 1) % num_experts,
    }
    if num_experts > 256:
        found["ids modulo 256"] = lambda: recorded % 256
    return found
