"""Routes of samples that are packed in two ways: recorded or shared in one, replayed in the other.

Which tokens of a sample a rank holds depends on the packing under sequence and context parallelism,
so each rank of a stage gives every other what that one holds in the new packing.

In: this rank's routes in the rows of some microbatches. Out: the same in the rows of others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int64, UInt8

from moe_replay.batch import Microbatch, RankPlace
from moe_replay.batch.routes import row_bytes
from moe_replay.megatron.ranks.messages import PIECE_BYTES, in_pieces
from moe_replay.megatron.ranks.replica import Replica
from moe_replay.routing import RouteForm, RouteSlice, expert_dtype

_NOTHING = np.empty(0, dtype=np.uint8)
_MAX_TOKENS = 1 << 32
"""Above every position, so that a number holds a sample and a position."""


def repack_routes(
    replica: Replica,
    routes: Mapping[int, RouteSlice],
    given: Sequence[Microbatch],
    wanted: Sequence[Microbatch],
) -> dict[int, RouteSlice]:
    """Return this rank's routes of each microbatch of ``wanted``, by its key; collective.

    ``routes`` are those of this rank's rows of ``given``, which packs the same samples. Rows are
    found again by sample and position. A piece of the microbatches travels at once.

    Worked example: samples 4 and 5 of 3 and 2 tokens, given as two microbatches [4] and [5], wanted
    as one [5 4]. Rows (4, 0) (4, 1) (4, 2) and (5, 0) (5, 1) land in the rows 2 3 4 and 0 1.
    """
    first = routes[given[0].key]
    form = RouteForm(
        layers=first.layers, num_experts=first.num_experts, topk=first.expert_ids.shape[2]
    )
    landing = _Landing(wanted, form)
    own = replica.peers[replica.own]
    # Codes of the tokens that each rank of this stage is to hold; None on other stages.
    needs = [
        _needed(wanted, peer.place) if peer.layers == replica.layers else None
        for peer in replica.peers
    ]
    for piece in in_pieces(given, lambda m: sum(m.lengths) * row_bytes(form), PIECE_BYTES):
        held = [_tokens_of(m, own.place) for m in piece]
        outgoing = [
            _NOTHING
            if needed is None
            else _payload([routes[m.key] for m in piece], [np.isin(t, needed) for t in held])
            for needed in needs
        ]
        tokens = [
            [] if needed is None else [_only(_tokens_of(m, peer.place), landing) for m in piece]
            for peer, needed in zip(replica.peers, needs, strict=True)
        ]
        incoming = replica.ranks.exchange(
            outgoing, [sum(map(len, part)) * row_bytes(form) for part in tokens]
        )
        for part, received in zip(tokens, incoming, strict=True):
            landing.take(part, received)
    return landing.slices()


def _needed(wanted: Sequence[Microbatch], place: RankPlace) -> Int64[np.ndarray, " tokens"]:
    tokens = np.concatenate([_tokens_of(m, place) for m in wanted])
    return np.unique(tokens[tokens >= 0])


def _only(tokens: Int64[np.ndarray, " rows"], landing: _Landing) -> Int64[np.ndarray, " some"]:
    return tokens[landing.holds(tokens)]


def _payload(
    routes: Sequence[RouteSlice], chosen: Sequence[Bool[np.ndarray, " rows"]]
) -> UInt8[np.ndarray, " _"]:
    """Return the bytes of some rows of each microbatch: which have a route, then their ids."""
    parts = [_NOTHING]
    for held, rows in zip(routes, chosen, strict=True):
        parts += [held.valid[rows].view(np.uint8), _bytes_of(held.expert_ids[:, rows])]
    return np.concatenate(parts)


class _Landing:
    """The rows of the wanted microbatches, one after another, and what has landed in them."""

    def __init__(self, wanted: Sequence[Microbatch], form: RouteForm) -> None:
        self._wanted, self._form = wanted, form
        rows = [_codes(m.sample_ids[m.router_rows], m.positions[m.router_rows]) for m in wanted]
        self._ends = np.cumsum([len(part) for part in rows])
        codes = np.concatenate(rows)
        self._order = np.argsort(codes, kind="stable")
        self._codes = codes[self._order]
        # Padding has the code -1, and no route.
        self._landed = codes < 0
        dtype = expert_dtype(form.num_experts)
        self._ids = np.zeros((len(form.layers), len(codes), form.topk), dtype=dtype)
        self._valid = np.zeros(len(codes), dtype=bool)

    def holds(self, tokens: Int64[np.ndarray, " rows"]) -> Bool[np.ndarray, " rows"]:
        """Return which tokens have a row here."""
        return (self._codes[self._places(tokens)] == tokens) & (tokens >= 0)

    def _places(self, tokens: Int64[np.ndarray, " rows"]) -> Int64[np.ndarray, " rows"]:
        return np.minimum(np.searchsorted(self._codes, tokens), len(self._codes) - 1)

    def take(
        self,
        microbatches: Sequence[Int64[np.ndarray, " _"]],
        received: UInt8[np.ndarray, " _"],
    ) -> None:
        """Take the routes of one rank's rows of some microbatches, all of which land here."""
        start = 0
        for tokens in microbatches:
            stop = start + len(tokens) * row_bytes(self._form)
            valid = received[start : start + len(tokens)].view(bool)
            ids = received[start + len(tokens) : stop].view(self._ids.dtype)
            ids = ids.reshape(len(self._form.layers), len(tokens), self._form.topk)
            rows = self._order[self._places(tokens)]
            self._valid[rows], self._ids[:, rows] = valid, ids
            self._landed[rows] = True
            start = stop

    def slices(self) -> dict[int, RouteSlice]:
        """Return the routes of each microbatch, once all have landed."""
        assert self._landed.all(), "two packings hold different samples"
        found = {}
        for microbatch, stop, start in zip(
            self._wanted, self._ends, [0, *self._ends[:-1]], strict=True
        ):
            found[microbatch.key] = RouteSlice(
                expert_ids=self._ids[:, start:stop].copy(),
                valid=self._valid[start:stop].copy(),
                layers=self._form.layers,
                num_experts=self._form.num_experts,
            )
        return found


def _tokens_of(microbatch: Microbatch, place: RankPlace) -> Int64[np.ndarray, " rows"]:
    """Return which token each router row of the rank at ``place`` holds, -1 for padding."""
    lengths = microbatch.lengths
    rows = place.router_index(lengths, row_multiple=microbatch.row_multiple).rows
    starts = np.cumsum([0, *lengths])
    number = np.searchsorted(starts, rows, side="right") - 1
    # Padding is row -1 and of no sample: number -1 is the entry at the end.
    sample_ids = np.array([*(s.sample_id for s in microbatch.samples), -1], dtype=np.int64)
    return _codes(sample_ids[number], rows - starts[number])


def _codes(
    sample_ids: Int64[np.ndarray, " rows"], positions: Int64[np.ndarray, " rows"]
) -> Int64[np.ndarray, " rows"]:
    return np.where(sample_ids < 0, -1, sample_ids * _MAX_TOKENS + positions)


def _bytes_of(ids: np.ndarray) -> UInt8[np.ndarray, " _"]:
    return np.ascontiguousarray(ids).reshape(-1).view(np.uint8)
