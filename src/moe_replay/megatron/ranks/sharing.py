"""What the ranks of a replica exchange: tokens to all, routes to the rank that replays them.

In: completions and traces of this rank. Out: completions of the replica; this rank's routes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, MutableMapping, Sequence, Set
from dataclasses import replace

import numpy as np
from jaxtyping import UInt8

from moe_replay.batch import Microbatch
from moe_replay.batch.routes import cut_routes, empty_slice, fill_routes, row_bytes, rows_of
from moe_replay.engines.types import Completion
from moe_replay.errors import TraceError
from moe_replay.megatron.ranks.messages import PIECE_BYTES, in_pieces
from moe_replay.megatron.ranks.replica import Replica
from moe_replay.routing import RouteForm, RouteSlice, RoutingTrace

_COMPLETION_BYTES = 512  # of a completion beside its arrays, generously
_NOTHING = np.empty(0, dtype=np.uint8)


def share_completions(
    replica: Replica, own: Mapping[tuple[int, int], Completion]
) -> dict[tuple[int, int], Completion]:
    """Return the completions of all ranks of the replica in the prompts' order; collective.

    Keys are (index of the prompt in the step, of the completion). Traces stay where they were
    sampled: the completions of ``own`` have none.
    """
    assert all(completion.trace is None for completion in own.values())
    gathered = replica.ranks.gather_items(
        list(own.items()),
        lambda c: (
            c[1].token_ids.nbytes
            + c[1].rollout_logprobs.nbytes
            + (0 if c[1].candidates is None else c[1].candidates.nbytes)
            + _COMPLETION_BYTES
        ),
    )
    shared = sorted((c for part in gathered for c in part), key=lambda c: c[0])
    assert len(dict(shared)) == len(shared), "ranks sampled the same prompt"
    return dict(shared)


def share_routes(
    replica: Replica,
    microbatches: Sequence[Microbatch],
    traces: MutableMapping[int, RoutingTrace],
) -> dict[int, RouteSlice]:
    """Return this rank's routes of each microbatch, by its key; collective over the replica.

    ``traces`` (sample id -> trace) are those of the samples that this rank holds. Each rank cuts,
    for every other, the layers and rows which that rank owns, so no rank ever holds the routes of
    the whole batch. Microbatches go one after another, as many at once as fill `PIECE_BYTES`, and
    ``traces`` is emptied as they go: what a rank sends makes room for what it receives.

    Worked example of one microbatch: samples 4 and 5 of 3 and 2 tokens, two ranks under context
    parallelism. Padded to 4 tokens each, rank 0 holds the first and last quarter of each sample.

        rows of rank 0     0  -1   3  -1      rows of rank 1     1   2   4  -1
        sample             4       5                             4   4   5
        rank 0 sampled 4: it keeps row 0, and sends rows 1 and 2 to rank 1
        rank 1 sampled 5: it keeps row 4, and sends row 3 to rank 0

    Worked example of a large step: 8,192 samples of 32,768 tokens, 48 layers, top-8 of 128 experts,
    on 64 ranks in 8 replicas of 8. A token takes 48 x 8 = 384 bytes, a sample 12.6 MB, the step
    103 GB. Each rank sampled 128 samples (1.6 GB of traces) and replays an eighth of the rows and
    layers of its replica's 1,024 samples (1.6 GB). A piece is five samples, 63 MB: at most that
    leaves a rank, in two copies, and an eighth comes in. So a rank holds 1.6 GB and less than
    150 MB beside them, where one exchange of everything would take 1.6 GB for each of traces,
    parts, what leaves, what comes in and slices: 8 GB. There are 205 exchanges.

    Raises:
        TraceError: when traces differ in form, lack a layer that a rank routes, or some sample has
            a trace on no rank or on several.
        TokenMismatchError: when a trace was recorded for other tokens than its sample has.
    """
    form = _common_form(replica, traces)
    holders = _holders(replica, microbatches, traces)
    shared: dict[int, RouteSlice] = {}
    # Every rank of a replica has microbatches of the same samples, so all ranks cut alike.
    for piece in in_pieces(microbatches, lambda m: sum(m.lengths) * row_bytes(form), PIECE_BYTES):
        shared |= _exchange(replica, piece, _outgoing(replica, piece, traces), holders, form)
        for microbatch in piece:
            for sample in microbatch.samples:
                traces.pop(sample.sample_id, None)
    return shared


def _outgoing(
    replica: Replica, piece: Sequence[Microbatch], traces: Mapping[int, RoutingTrace]
) -> list[UInt8[np.ndarray, " _"]]:
    """Return what this rank sends to every rank of the replica, itself included."""
    parts: list[list[UInt8[np.ndarray, " _"]]] = [[_NOTHING] for _ in replica.peers]
    for microbatch in piece:
        held = {}
        for number, sample in enumerate(microbatch.samples):
            if sample.sample_id in traces:
                held[number] = traces[sample.sample_id]
                held[number].check_tokens(sample.token_ids, where=f"sample {sample.sample_id}")
        if not held:
            continue
        lengths = microbatch.lengths
        # Pipeline stages hold the same rows of different layers.
        rows = {
            place: place.router_index(lengths, row_multiple=microbatch.row_multiple)
            for place in {peer.place for peer in replica.peers}
        }
        for peer, part in zip(replica.peers, parts, strict=True):
            part += cut_routes(held, rows[peer.place], lengths, peer.layers)
    return [np.concatenate(part) for part in parts]


def _exchange(
    replica: Replica,
    piece: Sequence[Microbatch],
    outgoing: Sequence[UInt8[np.ndarray, " _"]],
    holders: Sequence[Set[int]],
    form: RouteForm,
) -> dict[int, RouteSlice]:
    """Send what is ``outgoing``, and return the routes that the ranks of the replica send here."""
    own = replace(form, layers=replica.layers)
    place = replica.peers[replica.own].place
    rows = [place.router_index(m.lengths, row_multiple=m.row_multiple) for m in piece]
    # For each sender, the local rows of each microbatch that it has the routes of.
    landing = [
        [
            rows_of(
                index,
                m.lengths,
                [n for n, sample in enumerate(m.samples) if sample.sample_id in held],
            )[0]
            for index, m in zip(rows, piece, strict=True)
        ]
        for held in holders
    ]
    incoming = replica.ranks.exchange(
        outgoing, [sum(map(len, of_sender)) * row_bytes(own) for of_sender in landing]
    )
    routes = [empty_slice(own, len(index.rows)) for index in rows]
    for payload, of_sender in zip(incoming, landing, strict=True):
        start = 0
        for into, local in zip(routes, of_sender, strict=True):
            stop = start + len(local) * row_bytes(own)
            fill_routes(into, local, payload[start:stop])
            start = stop
    return {m.key: slice_ for m, slice_ in zip(piece, routes, strict=True)}


def _common_form(replica: Replica, traces: Mapping[int, RoutingTrace]) -> RouteForm:
    """Agree on the form of all traces; a rank that sampled nothing learns it from the others."""
    forms = set().union(*replica.ranks.gather({trace.form for trace in traces.values()}))
    if len(forms) != 1:
        raise TraceError(
            f"the ranks of replica {replica.number} hold traces of {len(forms)} forms "
            f"{sorted(map(str, forms))}, expected one; their engines run different models, or no "
            "engine recorded routes"
        )
    (form,) = forms
    missing = sorted({layer for peer in replica.peers for layer in peer.layers} - set(form.layers))
    if missing:
        raise TraceError(
            f"the routes hold layers {list(form.layers)}, the model also routes in {missing}; the "
            "engine's model and this one differ, or the engine numbers MoE layers only"
        )
    return form


def _holders(
    replica: Replica, microbatches: Sequence[Microbatch], traces: Mapping[int, RoutingTrace]
) -> list[frozenset[int]]:
    """Return the samples that each rank has a trace of, once all ranks agree on the batch."""
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
