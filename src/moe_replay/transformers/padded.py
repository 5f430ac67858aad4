"""Replay in a batch, padded or padding-free: traces of sequences, laid into its rows.

In: traces, ``input_ids``, ``attention_mask``. Out: routes of all rows of the batch, and a replay
scope over them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt
from torch import nn

from moe_replay.errors import TraceError
from moe_replay.routing import RouteForm, RoutingTrace
from moe_replay.routing.arrays import as_array
from moe_replay.transformers.replay import replay_routes


def place_traces(
    traces: Sequence[RoutingTrace], input_ids: Any, attention_mask: Any = None
) -> tuple[UInt[np.ndarray, "rows layers topk"], Bool[np.ndarray, " rows"]]:
    """Return the routes of every row of a batch, batch first, and which rows have one.

    ``input_ids`` is ``[batch, length]``, ``attention_mask`` the same with 1 at tokens and 0 at
    padding, on either side; without it there is no padding. Several traces for a batch of one
    sequence are laid one after another: a padding-free batch, which has no mask. A trace must be
    bound to the very tokens of its sequence.

    Example:
        Tokens ``[[0, 5, 6], [7, 8, 9]]`` with mask ``[[0, 1, 1], [1, 1, 1]]`` and traces of 2 and 3
        rows give 6 rows, of
        which row 0 is padding, and rows 2 and 5, each the last of its trace, are ``valid=False``
        too.

    Raises:
        TraceError: when shapes or counts differ, or the traces are of different models.
        TokenMismatchError: when a trace is bound to other tokens than its sequence has.
    """
    tokens = as_array(input_ids)
    if attention_mask is None and len(traces) > 1 and tokens.ndim == 2 and len(tokens) == 1:
        return _place_packed(traces, tokens[0])
    mask = np.ones(tokens.shape, dtype=bool) if attention_mask is None else as_array(attention_mask)
    if tokens.ndim != 2 or mask.shape != tokens.shape or len(traces) != len(tokens) or not traces:
        raise TraceError(
            f"{len(traces)} traces, input_ids {list(tokens.shape)} and attention_mask {list(mask.shape)}, expected one trace "
            "a sequence, and both of [batch, length]; masks of [batch, 1, length, length] do not say where tokens are"
        )
    if not np.isin(mask, (0, 1)).all():
        raise TraceError(
            f"attention_mask holds {np.unique(mask)[:4].tolist()}, expected 1 at tokens and 0 at padding; additive masks and "
            "masks that number packed sequences do not say where tokens are"
        )
    RouteForm.common((trace.form for trace in traces), "sequences of a batch")
    first = traces[0]
    expert_ids = np.zeros((*tokens.shape, *first.expert_ids.shape[1:]), first.expert_ids.dtype)
    valid = np.zeros(tokens.shape, dtype=bool)
    for number, (trace, held) in enumerate(zip(traces, mask.astype(bool), strict=True)):
        trace.check_tokens(tokens[number, held], where=f"sequence {number} of the batch")
        expert_ids[number, held] = trace.expert_ids
        valid[number, held] = trace.valid
    return expert_ids.reshape(-1, *first.expert_ids.shape[1:]), valid.reshape(-1)


def _place_packed(
    traces: Sequence[RoutingTrace], tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    lengths = [len(trace.expert_ids) for trace in traces]
    if sum(lengths) != len(tokens):
        raise TraceError(
            f"{len(traces)} traces of {sum(lengths)} rows in all for one row of {len(tokens)} tokens, expected as many: "
            "a padding-free batch holds whole sequences one after another, and nothing else"
        )
    RouteForm.common((trace.form for trace in traces), "sequences of a batch")
    starts = np.cumsum([0, *lengths])
    for number, (trace, start) in enumerate(zip(traces, starts[:-1], strict=True)):
        held = tokens[start : start + len(trace.expert_ids)]
        trace.check_tokens(held, where=f"sequence {number} of the batch")
    return (
        np.concatenate([trace.expert_ids for trace in traces]),
        np.concatenate([trace.valid for trace in traces]),
    )


@contextmanager
def replay_traces(
    model: nn.Module,
    traces: Sequence[RoutingTrace],
    *,
    input_ids: Any,
    attention_mask: Any = None,
) -> Iterator[None]:
    """Force the experts of a batch, padded or not, by its traces; see `place_traces`.

    Padding rows, and rows whose trace has no route, are routed live.

    Examples:
        >>> with replay_traces(model, traces, input_ids=ids, attention_mask=mask):
        ...     logits = model(ids, attention_mask=mask).logits

    Raises:
        TraceError: when traces and batch differ in count or shape, or the routes cannot be this
            model's.
        TokenMismatchError: when a trace is bound to other tokens than its sequence has.
        UnsupportedError: when the model is dense, or a router fails its proof.
        ReplayScopeError: when a forward has another number of rows, a router never ran, or
            recomputation happened outside the scope.
    """
    expert_ids, valid = place_traces(traces, input_ids, attention_mask)
    with replay_routes(model, expert_ids, valid, layers=traces[0].layers):
        yield
