"""Completions and their routes on the way from the replica that sampled them to the one they train.

A rank sends only to the rank of its own place in the other replica, which then shares with its
peers what they need. Bounded pieces, and nothing goes to a rank that does not hold it afterwards.

In: completions and traces of this rank. Out: those that this rank holds in their place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import UInt8

from moe_replay.engines.types import Completion
from moe_replay.megatron.ranks.messages import PIECE_BYTES
from moe_replay.megatron.ranks.replica import Replica
from moe_replay.routing import Origin, RouteForm, RoutingTrace, expert_dtype
from moe_replay.routing.arrays import owned
from moe_replay.routing.candidates import Candidates

Key = tuple[int, int]
"""Index of the prompt in the step, and of the completion among those of the prompt."""
_HEADER_BYTES = 512
_NO_IDS = np.empty(0, dtype=np.int32)
_NO_LOGPROBS = np.empty(0, dtype=np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    """What is known of a completion before its arrays come: also how many bytes they take."""

    key: Key
    bare: Completion
    """Without arrays."""
    num_tokens: int
    """Of the completion."""
    num_sampled: int
    """Those among them that the policy sampled."""
    has_mask: bool
    """Whether the others are marked."""
    num_candidates: int | None
    """Ids that the sampled tokens were drawn from, of all of them; None without candidates."""
    num_rows: int
    """Of the trace; 0 without one."""
    form: RouteForm | None
    origin: Origin | None
    """Of the trace; None without one."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the arrays, as `_to_bytes` writes them."""
        return sum(size for size, _ in self.arrays())

    def arrays(self) -> Iterator[tuple[int, np.dtype]]:
        """Yield bytes and dtype of each array, in the order in which they travel."""
        yield 4 * self.num_tokens, np.dtype(np.int32)
        yield 4 * self.num_sampled, np.dtype(np.float32)
        if self.has_mask:
            yield self.num_tokens, np.dtype(bool)
        if self.num_candidates is not None:
            yield 4 * self.num_sampled, np.dtype(np.int32)
            yield 4 * self.num_candidates, np.dtype(np.uint32)
            yield 4 * self.num_sampled, np.dtype(np.float32)
        if self.form is not None:
            slots = len(self.form.layers) * self.form.topk
            dtype = expert_dtype(self.form.num_experts)
            yield self.num_rows * slots * dtype.itemsize, np.dtype(dtype)
            yield self.num_rows, np.dtype(bool)
            yield 8 * self.num_rows, np.dtype(np.uint64)


def hand_over(
    replica: Replica,
    own: Mapping[Key, Completion],
    traces: MutableMapping[Key, RoutingTrace],
    to: Mapping[Key, int],
) -> tuple[dict[Key, Completion], dict[Key, RoutingTrace]]:
    """Return the completions and traces that this rank holds once all have been handed over.

    Collective over the ranks of one place in all replicas. ``to`` (key -> number of the replica
    that trains it) is the same on all of them. ``traces`` is emptied as it goes: what a rank sends
    makes room for what it receives, and no rank sends or receives more than `PIECE_BYTES` at once,
    unless one completion is longer.

    Worked example: replica 0 sampled a and b, replica 1 sampled c and d; b is for replica 1, c for
    replica 0. Rank 2 of replica 0 sends the part of b that it sampled to rank 2 of replica 1, and
    gets c if that one sampled it. A step of 8,192 samples of 32,768 tokens on 64 replicas: 1,024 of
    them, 13 GB of traces, were sampled by the 64 ranks of one place. Each sends 63 of 64 of its 16
    traces, 0.2 GB, in pieces of five.
    """
    group, here = replica.siblings, replica.number
    headers = [_header(key, completion, traces.get(key)) for key, completion in own.items()]
    gathered = group.gather_items(headers, lambda header: _HEADER_BYTES)
    kept = {key: completion for key, completion in own.items() if to[key] == here}
    held = {key: traces.pop(key) for key in kept if key in traces}
    for piece in _pieces(gathered, to):
        outgoing = [[np.empty(0, dtype=np.uint8)] for _ in range(group.size)]
        for sender, header in piece:
            if sender == here:
                arrays = _to_bytes(own[header.key], traces.pop(header.key, None))
                outgoing[to[header.key]] += arrays
        arriving: list[list[_Header]] = [[] for _ in range(group.size)]
        for sender, header in piece:
            if to[header.key] == here:
                arriving[sender].append(header)
        incoming = group.exchange(
            [np.concatenate(parts) for parts in outgoing],
            [sum(header.num_bytes for header in headers) for headers in arriving],
        )
        for payload, headers in zip(incoming, arriving, strict=True):
            start = 0
            for header in headers:
                stop = start + header.num_bytes
                completion, trace = _from_bytes(header, payload[start:stop])
                kept[header.key] = completion
                if trace is not None:
                    held[header.key] = trace
                start = stop
    return kept, held


def _pieces(
    gathered: list[list[_Header]], to: Mapping[Key, int]
) -> Iterator[list[tuple[int, _Header]]]:
    """Yield what is sent at a time: (sender, header), the same on every rank.

    Senders take turns, so that all of them send in each piece.
    """
    moving = [
        (turn, sender, header)
        for sender, headers in enumerate(gathered)
        for turn, header in enumerate(h for h in headers if to[h.key] != sender)
    ]
    piece: list[tuple[int, _Header]] = []
    sent, received = [0] * len(gathered), [0] * len(gathered)
    for _, sender, header in sorted(moving, key=lambda move: move[:2]):
        size, receiver = header.num_bytes, to[header.key]
        if piece and max(sent[sender], received[receiver]) + size > PIECE_BYTES:
            yield piece
            piece, sent, received = [], [0] * len(gathered), [0] * len(gathered)
        piece.append((sender, header))
        sent[sender] += size
        received[receiver] += size
    if piece:
        yield piece


def _header(key: Key, completion: Completion, trace: RoutingTrace | None) -> _Header:
    assert completion.trace is None
    return _Header(
        key=key,
        bare=replace(
            completion,
            token_ids=_NO_IDS,
            rollout_logprobs=_NO_LOGPROBS,
            turn_mask=None,
            candidates=None,
        ),
        num_tokens=len(completion.token_ids),
        num_sampled=len(completion.rollout_logprobs),
        has_mask=completion.turn_mask is not None,
        num_candidates=None if completion.candidates is None else len(completion.candidates.ids),
        num_rows=0 if trace is None else len(trace),
        form=None if trace is None else trace.form,
        origin=None if trace is None else trace.origin,
    )


def _to_bytes(completion: Completion, trace: RoutingTrace | None) -> list[UInt8[np.ndarray, " _"]]:
    arrays: list[np.ndarray] = [completion.token_ids, completion.rollout_logprobs]
    if completion.turn_mask is not None:
        arrays.append(completion.turn_mask)
    if (candidates := completion.candidates) is not None:
        arrays += [candidates.counts, candidates.ids, candidates.kept_mass]
    if trace is not None:
        arrays += [trace.expert_ids, trace.valid, trace.token_digest]
    return [np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in arrays]


def _from_bytes(
    header: _Header, payload: UInt8[np.ndarray, " _"]
) -> tuple[Completion, RoutingTrace | None]:
    arrays, start = [], 0
    for size, dtype in header.arrays():
        # A copy: a view would keep the whole piece alive.
        array = np.empty(size // dtype.itemsize, dtype=dtype)
        array.view(np.uint8)[:] = payload[start : start + size]
        arrays.append(owned(array))
        start += size
    ids, logprobs, *rest = arrays
    mask = rest.pop(0) if header.has_mask else None
    candidates = None
    if header.num_candidates is not None:
        counts, kept_ids, mass, *rest = rest
        candidates = Candidates(counts=counts, ids=kept_ids, kept_mass=mass)
    completion = replace(
        header.bare,
        token_ids=ids,
        rollout_logprobs=logprobs,
        turn_mask=mask,
        candidates=candidates,
    )
    if header.form is None or header.origin is None:
        return completion, None
    form = header.form
    return completion, RoutingTrace(
        expert_ids=rest[0].reshape(header.num_rows, len(form.layers), form.topk),
        valid=rest[1],
        layers=form.layers,
        num_experts=form.num_experts,
        token_digest=rest[2],
        origin=header.origin,
    )
