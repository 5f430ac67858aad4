"""What the ranks of a replica give one another: sampled tokens to all, routes to the rank that replays them.

In: completions and traces of this rank. Out: samples of the whole replica; microbatches with this rank's routes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float32, Int32

from moe_replay.batch import Microbatch, RouteForm
from moe_replay.batch.routes import cut_routes, empty_slice, narrowed, pack_rows, unpack_rows
from moe_replay.errors import TraceError
from moe_replay.megatron.replica import Replica
from moe_replay.rollout.types import FinishReason
from moe_replay.routing import RoutingTrace


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
    # Raw bytes are read back as these two; `check_groups` has refused everything else at the border.
    assert all(c.token_ids.dtype == np.int32 for c in own)
    assert all(c.rollout_logprobs.dtype == np.float32 for c in own)
    header = [[c.place, c.number, len(c.token_ids), str(c.finish_reason), c.server] for c in own]
    text = json.dumps(header).encode()
    arrays = [c.token_ids.tobytes() for c in own] + [c.rollout_logprobs.tobytes() for c in own]
    payload = b"".join([len(text).to_bytes(8, "little"), text, *arrays])
    everyone = [c for part in replica.gather(payload) for c in _unpack_completions(part)]
    return sorted(everyone, key=lambda c: (c.place, c.number))


def _unpack_completions(payload: bytes) -> list[SharedCompletion]:
    start = 8 + int.from_bytes(payload[:8], "little")
    header = json.loads(payload[8:start])
    total = sum(length for _, _, length, *_ in header)
    tokens = np.frombuffer(payload, dtype=np.int32, count=total, offset=start)
    logprobs = np.frombuffer(payload, dtype=np.float32, count=total, offset=start + tokens.nbytes)
    ends = np.cumsum([length for _, _, length, *_ in header])
    return [
        SharedCompletion(
            place=place,
            number=number,
            token_ids=tokens[end - length : end],
            rollout_logprobs=logprobs[end - length : end],
            finish_reason=FinishReason(reason),
            server=server,
        )
        for (place, number, length, reason, server), end in zip(header, ends, strict=True)
    ]


def share_routes(
    replica: Replica,
    microbatches: Sequence[Microbatch],
    traces: Mapping[int, RoutingTrace],
) -> list[Microbatch]:
    """Return the microbatches with the routes of this rank's layers and rows; collective over the replica.

    ``traces`` (sample id -> trace) are those of the samples that this rank sampled. Each rank cuts, for every other,
    the layers and rows which that rank owns, so nobody ever holds the routes of the whole batch.

    Raises:
        TraceError: when the traces differ in form, or some sample has a trace on no rank or on several.
    """
    form = _common_form(replica, traces)
    numbers = [
        {number: s.sample_id for number, s in enumerate(m.samples) if s.sample_id in traces}
        for m in microbatches
    ]
    if replica.size == 1:
        return [
            replace(
                m,
                routes=cut_routes(
                    [traces[s.sample_id] for s in m.samples], m.router_index, replica.layers
                ),
            )
            for m in microbatches
        ]
    outgoing = []
    for peer in replica.peers:
        kept = narrowed(form, peer.layers)
        parts = []
        for microbatch, mine in zip(microbatches, numbers, strict=True):
            index = peer.place.router_index(
                microbatch.lengths, row_multiple=microbatch.row_multiple
            )
            held = {number: traces[sample_id] for number, sample_id in mine.items()}
            parts.append(pack_rows(index, microbatch.lengths, held, kept.layers))
        outgoing.append(b"".join(parts))
    senders = [
        set(json.loads(part)) for part in replica.gather(json.dumps(sorted(traces)).encode())
    ]
    _check_senders(microbatches, senders)
    incoming = [memoryview(part) for part in replica.exchange(outgoing)]
    read = [0] * replica.size
    out = []
    for microbatch in microbatches:
        index = microbatch.router_index
        routes = empty_slice(narrowed(form, replica.layers), len(index.rows))
        ids = [sample.sample_id for sample in microbatch.samples]
        for sender, payload in enumerate(incoming):
            given = [number for number, sample_id in enumerate(ids) if sample_id in senders[sender]]
            read[sender] += unpack_rows(
                routes, index, microbatch.lengths, given, payload[read[sender] :]
            )
        out.append(replace(microbatch, routes=routes))
    return out


def _common_form(replica: Replica, traces: Mapping[int, RoutingTrace]) -> RouteForm:
    """Agree on the form of all traces; a rank that sampled nothing learns it from the others."""
    form = RouteForm.of(list(traces.values())) if traces else None
    message = json.dumps([list(form.layers), form.num_experts, form.topk] if form else None)
    forms = {
        RouteForm(layers=tuple(given[0]), num_experts=given[1], topk=given[2])
        for part in replica.gather(message.encode())
        if (given := json.loads(part)) is not None
    }
    if len(forms) != 1:
        raise TraceError(
            f"the ranks of replica {replica.number} hold traces of {len(forms)} forms {sorted(map(str, forms))}, "
            "expected one; their engines run different models, or no engine recorded routes"
        )
    return forms.pop()


def _check_senders(microbatches: Sequence[Microbatch], senders: Sequence[set[int]]) -> None:
    offered = [sample_id for ids in senders for sample_id in ids]
    wanted = [sample.sample_id for microbatch in microbatches for sample in microbatch.samples]
    if sorted(offered) != sorted(wanted):
        missing = sorted(set(wanted) - set(offered))
        twice = sorted({sample_id for sample_id in offered if offered.count(sample_id) > 1})
        raise TraceError(
            f"samples {missing} have a trace on no rank and samples {twice} on several; the ranks of this replica do "
            "not train on the same samples"
        )
