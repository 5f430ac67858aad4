"""What the ranks of a replica give one another: sampled tokens to all, routes to the rank that replays them.

In: completions and traces of this rank. Out: samples of the whole replica; microbatches with this rank's routes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from moe_replay.batch import Microbatch, RouteForm
from moe_replay.batch.routes import (
    SampleRows,
    cut_routes,
    empty_slice,
    narrowed,
    num_packed_bytes,
    pack_rows,
    unpack_rows,
)
from moe_replay.engines.types import FinishReason
from moe_replay.errors import TraceError
from moe_replay.megatron.ranks.messages import PIECE_BYTES
from moe_replay.megatron.ranks.replica import Replica
from moe_replay.routing import RoutingTrace

_COMPLETION_BYTES = 512  # of a completion beside its two arrays, generously
_NOTHING = np.empty(0, dtype=np.uint8)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SharedCompletion:
    """A completion as every rank of a replica knows it; its trace stays where it was sampled."""

    place: int
    """Of its prompt among the prompts of the step."""
    number: int
    """Among the completions of that prompt."""
    token_ids: Int32[np.ndarray, " completion"]
    """``[T]`` sampled ids."""
    rollout_logprobs: Float32[np.ndarray, " completion"]
    """``[T]``, in nats."""
    finish_reason: FinishReason
    """Why it ended."""
    server: str
    """Address of the server that sampled it; empty for an engine in a trainer's process."""


def share_completions(replica: Replica, own: Sequence[SharedCompletion]) -> list[SharedCompletion]:
    """Return the completions of all ranks of the replica, ordered by prompt and number; collective over it."""
    gathered = replica.ranks.gather_items(
        own, lambda c: c.token_ids.nbytes + c.rollout_logprobs.nbytes + _COMPLETION_BYTES
    )
    return sorted((c for part in gathered for c in part), key=lambda c: (c.place, c.number))


def share_routes(
    replica: Replica,
    microbatches: Sequence[Microbatch],
    traces: MutableMapping[int, RoutingTrace],
) -> list[Microbatch]:
    """Return the microbatches with the routes of this rank's layers and rows; collective over the replica.

    ``traces`` (sample id -> trace) are those of the samples that this rank sampled. Each rank cuts, for every other,
    the layers and rows which that rank owns, so nobody ever holds the routes of the whole batch. Microbatches go one
    after another, as many at once as fill `PIECE_BYTES`, and ``traces`` is emptied as they go: what a rank gives away
    makes room for what it receives.

    Worked example: 8,192 samples of 32,768 tokens, 48 layers, top-8 of 128 experts, on 64 ranks in 8 replicas of 8.
    A token takes 48 x 8 = 384 bytes, a sample 12.6 MB, the step 103 GB. Each rank sampled 128 samples (1.6 GB of
    traces) and replays an eighth of the rows and layers of its replica's 1,024 samples (1.6 GB). A piece is five
    samples, 63 MB: at most that leaves a rank, in two copies, and an eighth comes in. So a rank holds 1.6 GB and less
    than 150 MB beside them, where one exchange of everything would take 1.6 GB for each of traces, parts, what leaves,
    what comes in and slices: 8 GB. There are 205 exchanges.

    Raises:
        TraceError: when the traces differ in form, or some sample has a trace on no rank or on several.
    """
    form = _common_form(replica, traces)
    holders = _holders(replica, microbatches, traces)
    shared = []
    for piece in _pieces(microbatches, form.row_bytes):
        if replica.size == 1:
            shared += [
                replace(
                    m,
                    routes=cut_routes(
                        [traces[s.sample_id] for s in m.samples], m.router_index, replica.layers
                    ),
                )
                for m in piece
            ]
        else:
            outgoing = _outgoing(replica, piece, traces, form)
            shared += _exchange(replica, piece, outgoing, holders, form)
        for microbatch in piece:
            for sample in microbatch.samples:
                traces.pop(sample.sample_id, None)
    return shared


def _pieces(microbatches: Sequence[Microbatch], row_bytes: int) -> Iterator[list[Microbatch]]:
    """Yield consecutive microbatches whose routes, of all ranks together, fill `PIECE_BYTES`; at least one at a time.

    Every rank of a replica has microbatches of the same samples, so all cut alike.
    """
    piece: list[Microbatch] = []
    held = 0
    for microbatch in microbatches:
        size = sum(microbatch.lengths) * (1 + row_bytes)
        if piece and held + size > PIECE_BYTES:
            yield piece
            piece, held = [], 0
        piece.append(microbatch)
        held += size
    if piece:
        yield piece


def _outgoing(
    replica: Replica,
    piece: Sequence[Microbatch],
    traces: MutableMapping[int, RoutingTrace],
    form: RouteForm,
) -> list[UInt8[np.ndarray, " _"]]:
    """Return what this rank sends to every rank of the replica, itself included."""
    parts: list[list[UInt8[np.ndarray, " _"]]] = [[] for _ in replica.peers]
    for microbatch in piece:
        held = {
            number: traces[sample.sample_id]
            for number, sample in enumerate(microbatch.samples)
            if sample.sample_id in traces
        }
        if not held:
            continue
        # Pipeline stages hold the same rows of different layers.
        rows = {
            place: SampleRows(
                place.router_index(microbatch.lengths, row_multiple=microbatch.row_multiple),
                microbatch.lengths,
            )
            for place in {peer.place for peer in replica.peers}
        }
        for peer, part in zip(replica.peers, parts, strict=True):
            part += pack_rows(rows[peer.place], held, narrowed(form, peer.layers).layers)
    return [np.concatenate([_NOTHING, *part]) for part in parts]


def _exchange(
    replica: Replica,
    piece: Sequence[Microbatch],
    outgoing: Sequence[UInt8[np.ndarray, " _"]],
    holders: Sequence[Set[int]],
    form: RouteForm,
) -> list[Microbatch]:
    """Return the microbatches with what the ranks of the replica send to this one."""
    kept = narrowed(form, replica.layers)
    rows = [SampleRows(m.router_index, m.lengths) for m in piece]
    numbers = [
        [[n for n, s in enumerate(m.samples) if s.sample_id in held] for m in piece]
        for held in holders
    ]
    incoming = replica.ranks.exchange(
        outgoing,
        [
            sum(num_packed_bytes(r, n, kept) for r, n in zip(rows, of, strict=True))
            for of in numbers
        ],
    )
    routes = [empty_slice(kept, len(m.router_index.rows)) for m in piece]
    for payload, of_sender in zip(incoming, numbers, strict=True):
        at = 0
        for into, r, n in zip(routes, rows, of_sender, strict=True):
            at += unpack_rows(into, r, n, payload[at:])
    return [replace(m, routes=r) for m, r in zip(piece, routes, strict=True)]


def _common_form(replica: Replica, traces: Mapping[int, RoutingTrace]) -> RouteForm:
    """Agree on the form of all traces; a rank that sampled nothing learns it from the others."""
    own = RouteForm.of(list(traces.values())) if traces else None
    forms = {form for form in replica.ranks.gather(own) if form is not None}
    if len(forms) != 1:
        raise TraceError(
            f"the ranks of replica {replica.number} hold traces of {len(forms)} forms {sorted(map(str, forms))}, "
            "expected one; their engines run different models, or no engine recorded routes"
        )
    return forms.pop()


def _holders(
    replica: Replica, microbatches: Sequence[Microbatch], traces: Mapping[int, RoutingTrace]
) -> list[frozenset[int]]:
    """Return which samples each rank of the replica has a trace of, once all agree on what they train on."""
    packed = [([s.sample_id for s in m.samples], m.lengths, m.row_multiple) for m in microbatches]
    gathered = replica.ranks.gather((frozenset(traces), packed))
    # Sizes of messages are computed from these, by both sides.
    assert all(theirs == packed for _, theirs in gathered), "ranks packed different microbatches"
    holders = [held for held, _ in gathered]
    times = Counter(sample_id for held in holders for sample_id in held)
    wanted = {sample_id for ids, _, _ in packed for sample_id in ids}
    if times.keys() != wanted or set(times.values()) > {1}:
        missing = sorted(wanted - times.keys())
        twice = sorted(sample_id for sample_id, count in times.items() if count > 1)
        foreign = sorted(times.keys() - wanted)
        raise TraceError(
            f"of the samples of replica {replica.number}, {missing} have a trace on no rank and {twice} on several, and "
            f"there are traces of samples {foreign} that nobody trains on; every sample needs the one trace of the rank "
            "that sampled it: the engine recorded none, or the ranks do not train on the same samples"
        )
    return holders
