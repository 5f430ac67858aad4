"""Makes one trace of a rollout of several engine calls, in turns or aborted and resumed.

Each call feeds the sequence so far, so a token is fed many times: once for real, and again whenever
a later call prefills what came before. Later weights choose other experts. The row of a token
therefore comes from the call that fed it *first*: for a sampled token that is the call in which the
next one was sampled from it, for a token of the environment the call that prefilled it. The token
sampled last in a call was not fed by that call; its row comes from the next one. A call that was
aborted before it sampled anything owns nothing, as nothing was sampled from its rows: they belong
to the next call that samples. When the call that owns a row has no route for it, the row is
``valid=False``: a later prefill's route is not the one that the rollout used.

::

    call 0   prompt a b c   samples d e      owns rows a b c d
    call 1   prompt .. e, environment f g    owns rows e f g h
             samples h i                     row i was never fed: valid=False
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from moe_replay.errors import TokenMismatchError, TraceError
from moe_replay.routing.arrays import owned
from moe_replay.routing.digest import crop_digest, digest_tokens, first_difference
from moe_replay.routing.origin import Origin, PolicySpan
from moe_replay.routing.replay import Coverage
from moe_replay.routing.trace import RoutingTrace

if TYPE_CHECKING:
    from jaxtyping import Bool, Integer


class RowKind(StrEnum):
    """Where the token of a row came from."""

    PROMPT = "prompt"
    """It was in the prompt of the first call."""
    ENVIRONMENT = "environment"
    """A later call was given it: a tool's answer, the next user turn, a template's separators."""
    SAMPLED = "sampled"
    """The policy sampled it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EngineCall:
    """One request to an engine within a rollout, and the routes that it returned."""

    fed_ids: Integer[np.ndarray, " fed"]
    """``[fed]``, the prompt of this call: all tokens so far, those of earlier calls included."""
    sampled_ids: Integer[np.ndarray, " sampled"]
    """``[sampled]``, the tokens that this call sampled; none when it was aborted at once."""
    trace: RoutingTrace
    """Bound to the last ``len(trace)`` tokens of ``fed_ids + sampled_ids``, all of them or fewer.
    A call that returned no routes has an `unrouted_trace`. The last row is ``valid=False``."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StitchedRollout:
    """One sequence with one trace, however many calls it took."""

    token_ids: Integer[np.ndarray, " tokens"]
    """``[tokens]``, everything fed and sampled."""
    prompt_length: int
    """Tokens of the first call's prompt."""
    is_sampled: Bool[np.ndarray, " tokens"]
    """``[tokens]``, True where the policy sampled the token: what a loss may count."""
    trace: RoutingTrace
    """One row a token; its policy spans say which weights routed which rows."""
    num_rows: Mapping[RowKind, int]
    """Rows by kind; the last row, which was never fed, is among the sampled ones."""
    num_routed: Mapping[RowKind, int]
    """Rows by kind that hold a route."""
    num_superseded: int
    """Routes that calls returned for rows of another call: prefills, and those of calls
    that sampled nothing."""

    @property
    def coverage(self) -> Coverage:
        """Rows with a route, and those without by reason."""
        return Coverage.of_rows(
            self.trace.valid, prompt_length=self.prompt_length, is_sampled=self.is_sampled
        )


def merge_partial(calls: Sequence[EngineCall], *, where: str) -> StitchedRollout:
    """Merge the calls of a rollout that was aborted and resumed, usually under newer weights.

    Each call is fed exactly what the calls before it fed and sampled.

    Raises:
        TokenMismatchError: when a call was fed something else, or a trace is bound to other tokens
            than its call's.
        TraceError: when there are no calls, or a trace claims a route for the token that its call
            sampled last.
    """
    for number, (before, call) in enumerate(pairwise(calls), start=1):
        so_far = len(before.fed_ids) + len(before.sampled_ids)
        if len(call.fed_ids) != so_far:
            raise TokenMismatchError(
                f"{where}: call {number} was fed {len(call.fed_ids)} tokens, expected the {so_far} that were fed and "
                "sampled before it: a resumed rollout goes on where it stopped; for turns with tokens of an "
                "environment between them use stitch_turns"
            )
    return stitch_turns(calls, where=where)


def stitch_turns(calls: Sequence[EngineCall], *, where: str) -> StitchedRollout:
    """Stitch the turns of a trajectory: each call is fed all before it, then the environment's.

    Raises:
        TokenMismatchError: when a call was not fed all that came before it, or a trace is bound to
            other tokens.
        TraceError: when there are no calls, or a trace claims a route for the token that its call
            sampled last.
    """
    if not calls:
        raise TraceError(f"{where}: no engine call to stitch; a rollout takes at least one")
    sequences = [np.concatenate([call.fed_ids, call.sampled_ids]) for call in calls]
    for number in range(1, len(calls)):
        _check_continues(sequences[number - 1], calls[number].fed_ids, number, where)
    tokens = sequences[-1]
    digest = digest_tokens(tokens)
    for number, (call, sequence) in enumerate(zip(calls, sequences, strict=True)):
        _check_trace(call.trace, calls[0].trace, digest[: len(sequence)], number, where)
    is_sampled = np.zeros(len(tokens), dtype=bool)
    for call, sequence in zip(calls, sequences, strict=True):
        is_sampled[len(call.fed_ids) : len(sequence)] = True
    trace, num_superseded = _owned_rows(calls, tokens)
    kinds = {
        RowKind.PROMPT: np.arange(len(tokens)) < len(calls[0].fed_ids),
        RowKind.SAMPLED: is_sampled,
    }
    kinds[RowKind.ENVIRONMENT] = ~(kinds[RowKind.PROMPT] | is_sampled)
    return StitchedRollout(
        token_ids=tokens,
        prompt_length=len(calls[0].fed_ids),
        is_sampled=is_sampled,
        trace=trace,
        num_rows={kind: int(rows.sum()) for kind, rows in kinds.items()},
        num_routed={kind: int((rows & trace.valid).sum()) for kind, rows in kinds.items()},
        num_superseded=num_superseded,
    )


def _owned_rows(
    calls: Sequence[EngineCall], tokens: Integer[np.ndarray, " tokens"]
) -> tuple[RoutingTrace, int]:
    """Take every row from the call that fed its token first, and count the routes left over.

    Worked example, the two calls of the module's picture: call 0 owns rows 0 to 3, as its row 4 was
    never fed. Call 1 returned 9 rows; rows 0 to 3 are superseded, and it owns rows 4 to 8. Had it
    returned its new rows alone, the last 5, ``offset`` would be 4 and nothing superseded.
    """
    model = calls[0].trace
    ids = np.zeros((len(tokens), *model.expert_ids.shape[1:]), dtype=model.expert_ids.dtype)
    valid = np.zeros(len(tokens), dtype=bool)
    spans: list[PolicySpan] = []
    num_superseded = done = 0
    for number, call in enumerate(calls, start=1):
        if not len(call.sampled_ids) and number < len(calls):
            num_superseded += call.trace.num_valid
            continue
        stop = len(call.fed_ids) + len(call.sampled_ids)
        end = stop if number == len(calls) else stop - 1
        offset = stop - len(call.trace)
        start = min(max(done, offset), end)
        rows = slice(start - offset, end - offset)
        num_superseded += int(call.trace.valid[: rows.start].sum())
        ids[start:end] = call.trace.expert_ids[rows]
        valid[start:end] = call.trace.valid[rows]
        _append_spans(spans, call.trace.origin, offset, done, end)
        done = end
    trace = RoutingTrace(
        expert_ids=owned(ids),
        valid=owned(valid),
        layers=model.layers,
        num_experts=model.num_experts,
        token_digest=owned(digest_tokens(tokens)),
        origin=Origin(
            engine=model.origin.engine,
            engine_version=model.origin.engine_version,
            spans=tuple(spans),
        ),
    )
    return trace, num_superseded


def _append_spans(
    spans: list[PolicySpan], origin: Origin, offset: int, start: int, stop: int
) -> None:
    """Append the spans of rows ``start:stop``; row 0 of ``origin`` is row ``offset``.

    Rows before ``offset`` hold no route; they ran under the weights that the call began with.
    """
    for number, span in enumerate(origin.spans):
        first = start if number == 0 else max(start, span.start + offset)
        last = min(stop, span.stop + offset)
        if first >= last:
            continue
        if spans and spans[-1].policy_version == span.policy_version:
            first = spans.pop().start
        spans.append(PolicySpan(start=first, stop=last, policy_version=span.policy_version))


def _check_continues(
    before: Integer[np.ndarray, " before"],
    fed: Integer[np.ndarray, " fed"],
    number: int,
    where: str,
) -> None:
    if len(fed) < len(before):
        raise TokenMismatchError(
            f"{where}: call {number} was fed {len(fed)} tokens, fewer than the {len(before)} that were fed and sampled "
            "before it; the context was cut or compacted, so this is another sequence: train it as a sample of its own"
        )
    differs = fed[: len(before)] != before
    if differs.any():
        row = int(differs.argmax())
        raise TokenMismatchError(
            f"{where}: call {number} was fed token {int(fed[row])} in row {row}, where {int(before[row])} was fed or "
            "sampled before it; the turn was decoded and encoded again, or its template rewrote earlier turns: feed the "
            "sampled ids themselves, or train the turns as separate samples"
        )


def _check_trace(
    trace: RoutingTrace, model: RoutingTrace, expected: np.ndarray, number: int, where: str
) -> None:
    ours, theirs = (model.form, model.origin.engine), (trace.form, trace.origin.engine)
    if ours != theirs:
        raise TraceError(
            f"{where}: the trace of call {number} has form and engine {theirs}, that of call 0 {ours}; one rollout is "
            "sampled by one model and engine"
        )
    if not 1 <= len(trace) <= len(expected):
        raise TokenMismatchError(
            f"{where}: the trace of call {number} has {len(trace)} rows, expected 1 to {len(expected)}, one for each token "
            "from some start to the end of the call; the calls are in another order, or a trace is another call's"
        )
    first = len(expected) - len(trace)
    row = first_difference(trace.token_digest, crop_digest(expected, first, len(expected)))
    if row is not None:
        raise TokenMismatchError(
            f"{where}: the trace of call {number} is bound to other tokens than the last {len(trace)} of the call, from row "
            f"{row} of the trace on; it is another call's, or it ends elsewhere than at the last sampled token"
        )
    if trace.valid[-1]:
        raise TraceError(
            f"{where}: the last row of the trace of call {number} is valid, but the token sampled last was not fed by that "
            "call: its routes are shifted by one row"
        )
