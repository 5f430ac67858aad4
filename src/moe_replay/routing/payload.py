"""What inference engines send, made into traces: every known form is told apart by its shape, none by a guess.

Engines differ in four ways, and each difference shows in the shape. *Layers*: all decoder layers (dense ones hold zeros
or leftovers) or MoE layers only. *Parts*: one array for prompt and completion, or two. *Rows*: one for each token that
was fed, which is every token but the last sampled one, from the first token or from a later ``start``. *Width*: any
integer type. Whatever fits no form raises with the count that was expected.

In: arrays as an engine sent them. Out: RoutingTrace. Called by: engine adapters of rollout, and other trainers.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np

from moe_replay.errors import TraceError
from moe_replay.routing.trace import (
    MIN_TOKENS_FOR_CONSTANT_CHECK,
    Origin,
    RoutingTrace,
    expert_dtype,
)

if TYPE_CHECKING:
    from jaxtyping import Bool, Integer, Shaped

Unwritten = Literal["refuse", "invalid"]
"""What to do with rows that nobody wrote: raise, or keep them as ``valid=False`` so that coverage counts them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedModel:
    """The numbers of a model that say what a payload may look like."""

    moe_layers: tuple[int, ...]
    """Global decoder indices of the layers that route, strictly increasing."""
    num_decoder_layers: int
    """All decoder layers, dense ones included, multi-token-prediction layers not."""
    num_experts: int
    """Routed experts a layer."""
    topk: int
    """Experts per token."""

    def __post_init__(self) -> None:
        layers = self.moe_layers
        if (
            not layers
            or any(b <= a for a, b in pairwise(layers))
            or not 0 <= layers[0] <= layers[-1] < self.num_decoder_layers
        ):
            raise TraceError(
                f"moe_layers {list(layers)} of {self.num_decoder_layers} decoder layers: expected increasing indices "
                "from 0, below the number of layers; a dense model has nothing to replay"
            )


def trace_from_payload(
    rows: Shaped[np.ndarray, "..."],
    *,
    token_ids: Integer[np.ndarray, " tokens"],
    num_prompt_tokens: int,
    model: RoutedModel,
    origin: Origin,
    where: str,
    start: int = 0,
    unwritten: Unwritten = "refuse",
) -> RoutingTrace:
    """Return the trace of the tokens from ``start`` on, out of one array for prompt and completion.

    With P prompt and T sampled tokens, ``rows`` is ``[rows, layers, topk]`` for the P - start + T - 1 tokens that were
    fed from ``start`` on. The trace has one row more, for the token sampled last, which is ``valid=False``. A prompt of 3
    tokens with 2 sampled ones comes as 4 rows and becomes a trace of 5.

    ``token_ids`` and the spans of ``origin`` cover all P + T tokens, whatever ``start`` is. ``where`` names the request
    in messages. A row is unwritten when each of its layers names one expert K times: a prefix-cache hit that left zeros.

    Raises:
        TraceError: when rows, layers or topk have another number than the model and the tokens imply, when rows are
            unwritten and not allowed to be, or when a row is not a possible route.
    """
    _check_lengths(token_ids, num_prompt_tokens, start, where)
    held = _moe_layers_of(rows, model, where)
    _check_rows(len(held), len(token_ids), num_prompt_tokens, start, where)
    return _bound(
        held,
        np.ones(len(held), dtype=bool),
        token_ids=token_ids,
        model=model,
        origin=origin,
        where=where,
        start=start,
        unwritten=unwritten,
    )


def trace_from_split_payload(
    prompt_rows: Shaped[np.ndarray, "..."] | None,
    completion_rows: Shaped[np.ndarray, "..."],
    *,
    token_ids: Integer[np.ndarray, " tokens"],
    num_prompt_tokens: int,
    model: RoutedModel,
    origin: Origin,
    where: str,
    start: int = 0,
    unwritten: Unwritten = "refuse",
) -> RoutingTrace:
    """Return the trace of the tokens from ``start`` on, out of one array for the prompt and one for the completion.

    ``prompt_rows`` holds P - start rows and ``completion_rows`` T - 1, as vLLM 0.21 sends them; everything else is as in
    `trace_from_payload`. Pass ``prompt_rows=None`` when the engine leaves prompt routes out: these rows are
    ``valid=False``, and coverage counts them.

    Raises:
        TraceError: as `trace_from_payload`, and when either part has another number of rows.
    """
    _check_lengths(token_ids, num_prompt_tokens, start, where)
    sampled = _moe_layers_of(completion_rows, model, where)
    num_prompt_rows = num_prompt_tokens - start
    if prompt_rows is None:
        prompt = np.zeros((num_prompt_rows, *sampled.shape[1:]), dtype=sampled.dtype)
    else:
        prompt = _moe_layers_of(prompt_rows, model, where)
    num_fed = len(token_ids) - num_prompt_tokens - 1
    if (len(prompt), len(sampled)) != (num_prompt_rows, num_fed):
        raise TraceError(
            f"{where}: the payload has {len(prompt)} prompt and {len(sampled)} completion rows, expected "
            f"{num_prompt_rows} (prompt of {num_prompt_tokens}, from {start} on) and {num_fed} (sampled tokens but the "
            "last, which is never fed); rows were lost in preemption, or an array of both parts was passed as one part: "
            "use trace_from_payload for that"
        )
    if prompt.dtype != sampled.dtype:
        raise TraceError(
            f"{where}: prompt rows are {prompt.dtype} and completion rows {sampled.dtype}; one engine writes one type, so "
            "they come from two requests or one of them was converted on the way"
        )
    return _bound(
        np.concatenate([prompt, sampled]),
        np.arange(num_prompt_rows + num_fed) >= (num_prompt_rows if prompt_rows is None else 0),
        token_ids=token_ids,
        model=model,
        origin=origin,
        where=where,
        start=start,
        unwritten=unwritten,
    )


def unrouted_trace(
    token_ids: Integer[np.ndarray, " tokens"], *, model: RoutedModel, origin: Origin
) -> RoutingTrace:
    """Return a trace without any route: what a call that gave none must have, so that its rows are counted."""
    count = len(token_ids)
    return RoutingTrace.record(
        np.zeros((count, len(model.moe_layers), model.topk), dtype=expert_dtype(model.num_experts)),
        token_ids=token_ids,
        valid=np.zeros(count, dtype=bool),
        layers=model.moe_layers,
        num_experts=model.num_experts,
        origin=origin,
    )


def _check_lengths(
    token_ids: Integer[np.ndarray, " tokens"], num_prompt_tokens: int, start: int, where: str
) -> None:
    if not 1 <= num_prompt_tokens < len(token_ids):
        raise TraceError(
            f"{where}: {num_prompt_tokens} prompt tokens of {len(token_ids)}, expected at least one prompt and one sampled "
            "token; token_ids must hold prompt and completion"
        )
    if not 0 <= start <= num_prompt_tokens:
        raise TraceError(
            f"{where}: rows start at token {start}, expected 0 to {num_prompt_tokens}, the end of the prompt; engines "
            "return every row of what they sample"
        )


def _moe_layers_of(
    rows: Shaped[np.ndarray, "..."], model: RoutedModel, where: str
) -> Integer[np.ndarray, "rows moe_layers topk"]:
    """Return the MoE layers of a payload in either layer form."""
    if rows.ndim != 3 or not np.issubdtype(rows.dtype, np.integer):
        raise TraceError(
            f"{where}: the payload is {rows.dtype}{list(rows.shape)}, expected integers of [rows, layers, topk]"
        )
    _, num_layers, topk = rows.shape
    if topk != model.topk:
        raise TraceError(
            f"{where}: the payload names {topk} experts per token and layer, the model uses {model.topk}; it is another "
            "model's, or shared experts are counted"
        )
    if num_layers == len(model.moe_layers):
        return rows
    if num_layers != model.num_decoder_layers:
        raise TraceError(
            f"{where}: the payload has {num_layers} layers, expected {model.num_decoder_layers} (all decoder layers) or "
            f"{len(model.moe_layers)} (MoE layers only); draft or multi-token-prediction layers are counted, a pipeline "
            "stage reported alone, or the engine serves another model"
        )
    dense = [n for n in range(num_layers) if n not in frozenset(model.moe_layers)]
    _refuse_routes_in_dense_layers(rows, dense, model.num_experts, where)
    return rows[:, list(model.moe_layers)]


def _refuse_routes_in_dense_layers(
    rows: Integer[np.ndarray, "rows layers topk"], dense: list[int], num_experts: int, where: str
) -> None:
    """Raise when a dense layer holds what only a router writes: as many MTP as dense layers give the same count."""
    if rows.shape[2] == 1 or len(rows) < MIN_TOKENS_FOR_CONSTANT_CHECK:
        return
    for layer in dense:
        ids = np.sort(rows[:, layer], axis=1)
        in_range = ids[:, 0].min() >= 0 and ids[:, -1].max() < num_experts
        if in_range and (ids[:, 1:] != ids[:, :-1]).all() and (ids != ids[0]).any():
            raise TraceError(
                f"{where}: decoder layer {layer} is dense, but the payload holds possible routes for it in all {len(rows)} "
                "rows; its layers are not the decoder layers in order: as many draft or multi-token-prediction layers as "
                "the model has dense ones were appended, which gives the same count"
            )


def _check_rows(
    num_rows: int, num_tokens: int, num_prompt_tokens: int, start: int, where: str
) -> None:
    expected = num_tokens - start - 1
    if num_rows == expected:
        return
    causes = {
        num_tokens
        - start: "a row for the last sampled token, which is never fed, was added or padded",
        num_tokens - 1: f"the engine ignored the start of {start}: crop nothing, pass start=0",
        num_tokens - num_prompt_tokens - 1: "these are the rows of the completion alone",
        num_prompt_tokens: "these are the rows of the prompt alone",
    }
    cause = causes.get(num_rows, "rows were dropped by preemption, or token_ids were re-tokenised")
    raise TraceError(
        f"{where}: the payload has {num_rows} rows, expected {expected}: {num_prompt_tokens} prompt and "
        f"{num_tokens - num_prompt_tokens} sampled tokens, from token {start} on, less the last one; probably {cause}"
    )


def _bound(
    rows: Integer[np.ndarray, "rows layers topk"],
    given: Bool[np.ndarray, " rows"],
    *,
    token_ids: Integer[np.ndarray, " tokens"],
    model: RoutedModel,
    origin: Origin,
    where: str,
    start: int,
    unwritten: Unwritten,
) -> RoutingTrace:
    """Add the row of the last token and bind everything to the tokens."""
    covered = origin.spans[-1].stop if origin.spans else 0
    if covered != len(token_ids):
        raise TraceError(
            f"{where}: the policy spans of the origin cover {covered} rows, expected {len(token_ids)}: all prompt and "
            "sampled tokens, also when the payload starts later"
        )
    valid = np.append(given & ~_unwritten_rows(rows, given, start, unwritten, where), False)
    try:
        return RoutingTrace.record(
            np.concatenate([rows, np.zeros_like(rows, shape=(1, *rows.shape[1:]))]),
            token_ids=np.asarray(token_ids)[start:],
            valid=valid,
            layers=model.moe_layers,
            num_experts=model.num_experts,
            origin=origin.crop(start, len(token_ids)),
        )
    except TraceError as error:
        raise TraceError(f"{where}: {error}") from error


def _unwritten_rows(
    rows: Integer[np.ndarray, "rows layers topk"],
    given: Bool[np.ndarray, " rows"],
    start: int,
    unwritten: Unwritten,
    where: str,
) -> Bool[np.ndarray, " rows"]:
    if rows.shape[2] == 1:
        if unwritten == "invalid":
            raise TraceError(
                f"{where}: with one expert per token an unwritten row looks like a route to expert 0, so unwritten rows "
                "cannot be told apart; turn the engine's prefix cache off"
            )
        return np.zeros(len(rows), dtype=bool)
    # A row whose first layer is a route has been written, so the other layers are seldom read.
    blank = (rows[:, 0] == rows[:, 0, :1]).all(axis=1) & given
    blank[blank] = (rows[blank] == rows[blank, :, :1]).all(axis=(1, 2))
    if blank.any() and unwritten == "refuse":
        first = int(blank.argmax())
        raise TraceError(
            f"{where}: {int(blank.sum())} of {len(rows)} rows are unwritten, the first is that of token {start + first}, "
            f"which names expert {int(rows[first, 0, 0])} {rows.shape[2]} times in every layer; the engine served them "
            "from its prefix cache or did not capture them: turn prefix caching off, or pass unwritten='invalid' to "
            "route these rows live and count them"
        )
    return blank
