"""What a replaying pass saw of live beside replayed routes: counts for the guard, and agreement."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
from jaxtyping import Int64

from moe_replay.batch import Microbatch
from moe_replay.grpo.guard.collapse import LiveSets
from moe_replay.grpo.metrics import Tally
from moe_replay.grpo.types import SampleOrigin
from moe_replay.megatron.ranks.messages import HostGroup
from moe_replay.megatron.replay.overlap import WatchedRoutes
from moe_replay.megatron.scorer import RouteWatch
from moe_replay.routing.guard import OverlapCounts, StepPart, StepTable, summarise
from moe_replay.routing.guard.verdict import SERVERS_JOINED_BY


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Seen:
    """What all ranks saw of a pass together; the same on every rank."""

    parts: Sequence[StepPart | None]
    """What each rank counted, in rank order; None of a rank that replays nothing."""
    table: StepTable
    """The same by (index of the sample in the step, layer)."""
    collapsed: Sequence[int]
    """Layers that send every token to the same experts."""

    def flips_by_layer(self) -> dict[str, list[float]]:
        """Return ``layers`` and, of each, ``flip_frac``: the share of its rows that flip."""
        flips: dict[int, float] = dict.fromkeys(self.table.layers, 0.0)
        rows = dict.fromkeys(self.table.layers, 0)
        for part in self.table.parts:
            for layer, count in zip(part.layers, part.flips.tolist(), strict=True):
                flips[layer] += count
                rows[layer] += int(part.num_rows.sum())
        return {
            "layers": list(flips),
            "flip_frac": [round(flips[layer] / max(1, rows[layer]), 6) for layer in flips],
        }

    def metrics(self, origins: Mapping[int, SampleOrigin]) -> dict[str, float]:
        """Return ``replay/agreement`` and the like; ``origins`` are those of all ranks."""
        table = self.table
        own, slots = table.own.sum(axis=1), table.slots.sum(axis=1)
        # A row counts once on each pipeline stage, so these are shares of what the stages saw.
        rows = sum(int(part.num_rows.sum()) for part in table.parts)
        pairs = sum(int(part.num_rows.sum()) * len(part.layers) for part in table.parts)
        metrics = {
            "replay/agreement": float(own.sum() / slots.sum()),
            "replay/agreement_min_sample": float(table.agreement.min()),
            "replay/agreement_min_layer": float(table.layer_agreement.min()),
            "replay/flip_frac": float(sum(part.flips.sum() for part in table.parts) / pairs),
            "replay/tokens_with_flip_frac": sum(p.rows_with_flip for p in table.parts) / rows,
            "replay/collapsed_layers": float(len(self.collapsed)),
        }
        of = [
            origins[number].server.split(SERVERS_JOINED_BY) for number in table.sample_ids.tolist()
        ]
        names = sorted({server for each in of for server in each})
        if len(names) > 1:
            for name in names:
                mine = np.array([name in each for each in of])
                shared = float(own[mine].sum() / slots[mine].sum())
                metrics[f"replay/agreement_server/{name.split('://')[-1]}"] = shared
        return metrics


class PassWatch:
    """Receives the counts of one pass on this rank, microbatch by microbatch."""

    def __init__(self, origins: Sequence[SampleOrigin]) -> None:
        """Watch a pass over the samples of ``origins``, by sample id."""
        self.counts: dict[int, OverlapCounts] = {}
        """Microbatch key -> its counts, in which samples have their indices in the step."""
        self._indices = np.array([origin.index for origin in origins], dtype=np.int64)
        self._live_sets = LiveSets()

    @property
    def route_watch(self) -> RouteWatch:
        """What is passed to the scoring or update."""
        return RouteWatch(observe=self.observe)

    def observe(self, microbatch: Microbatch, watched: WatchedRoutes) -> None:
        """Take the counts of a microbatch."""
        assert microbatch.routes is not None
        tokens = microbatch.token_ids[microbatch.router_rows][microbatch.routes.valid]
        self._live_sets.add(watched.use, tokens)
        counts = watched.counts
        # Indices in the step grow with sample ids, so the order of rows and samples stays.
        self.counts[microbatch.key] = replace(counts, sample_ids=self._indices[counts.sample_ids])

    def drift_tally(self, update: int) -> Tally:
        """Tally the agreement and the flips of this rank's rows in an update, counted from 1.

        Ranks that hold the same rows are as many for every row, so means over all ranks are right.
        """
        tally = Tally()
        for counts in self.counts.values():
            pairs = len(counts.own) * len(counts.layers)
            for name, total, count in (
                ("agreement", counts.own, pairs * counts.topk),
                ("flip_frac", counts.flips, pairs),
            ):
                tally.add_mean(
                    f"replay/{name}/update_{update}",
                    total=int(total.sum(dtype=np.int64)),
                    count=count,
                )
        return tally

    def forget(self, indices: Collection[int]) -> None:
        """Drop the counts of some samples, by index in the step."""
        if indices:
            given = np.array(sorted(indices), dtype=np.int64)
            self.counts = {key: _without(counts, given) for key, counts in self.counts.items()}

    def flips_of(self, chosen: Collection[int], ranks: HostGroup) -> dict[int, dict[int, int]]:
        """Return index in the step -> position -> layers that flip, over all layers; collective.

        Ranks that hold other layers of the same rows are added up.
        """
        mine = []
        for counts in self.counts.values():
            ends = np.cumsum(counts.num_rows)
            for index, start, end in zip(counts.sample_ids, counts.starts, ends, strict=True):
                if int(index) in chosen:
                    rows = slice(int(start), int(end))
                    mine.append((int(index), counts.position[rows], counts.flips[rows]))
        found: dict[int, dict[int, int]] = {}
        parts = ranks.gather_items(mine, lambda entry: 64 + entry[1].nbytes + entry[2].nbytes)
        for index, positions, flips in chain.from_iterable(parts):
            of_sample = found.setdefault(index, {})
            for position, count in zip(positions.tolist(), flips.tolist(), strict=True):
                of_sample[position] = of_sample.get(position, 0) + count
        return found

    def together(self, ranks: HostGroup) -> Seen | None:
        """Return what all ranks saw, None when nothing was replayed; collective."""
        part = summarise(list(self.counts.values()))
        gathered = ranks.gather((part, self._live_sets.to_plain()))
        parts = [part for part, _ in gathered]
        if not any(part is not None for part in parts):
            return None
        return Seen(
            parts=parts,
            table=StepTable.of(parts),
            collapsed=LiveSets.collapsed([sets for _, sets in gathered]),
        )


def _without(counts: OverlapCounts, indices: Int64[np.ndarray, " gone"]) -> OverlapCounts:
    """Return the counts of the samples that are not in ``indices``."""
    kept = ~np.isin(counts.sample_ids, indices)
    rows = np.repeat(kept, counts.num_rows)
    return replace(
        counts,
        position=counts.position[rows],
        own=counts.own[rows],
        others=counts.others[rows],
        flips=counts.flips[rows],
        nearer=counts.nearer[:, rows],
        farther=counts.farther[:, rows],
        repeats=counts.repeats[rows],
        sample_ids=counts.sample_ids[kept],
        num_rows=counts.num_rows[kept],
        layer_own=counts.layer_own[kept],
        layer_others=counts.layer_others[kept],
        layer_flips=counts.layer_flips[kept],
        layer_own_squares=counts.layer_own_squares[kept],
        layer_nearer=counts.layer_nearer[:, kept],
        layer_farther=counts.layer_farther[:, kept],
        layer_gain_squares=counts.layer_gain_squares[:, kept],
    )
