"""Makes traces of what inference engines send: each form is recognised by its shape alone.

Engines differ in four ways, and each difference shows in the shape. *Layers*: all decoder layers
(dense ones hold zeros or leftovers) or MoE layers only. *Parts*: one array for prompt and
completion, or two. *Rows*: one for each token that was fed, which is every token but the last
sampled one, from the first token or from a later ``start``. *Width*: any integer type. Whatever
fits no form raises with the count that was expected.

In: arrays as an engine sent them. Out: RoutingTrace.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moe_replay.errors import TraceError
from moe_replay.routing.arrays import as_array, check_holds_ids, owned
from moe_replay.routing.form import expert_dtype
from moe_replay.routing.layer_order import LayerOrder
from moe_replay.routing.origin import Origin
from moe_replay.routing.trace import RoutingTrace

if TYPE_CHECKING:
    from jaxtyping import Bool, Integer, Shaped

Unwritten = Literal["refuse", "invalid", "trust"]
"""What to do with rows that look unwritten: raise, keep them as ``valid=False`` and count them, or,
with one expert per token only, where expert 0 looks the same, trust the engine to have written
every row."""


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

    @classmethod
    def from_config(cls, config: Any) -> RoutedModel:
        """Return the numbers of the model of a Hugging Face config, or of a checkpoint's folder.

        Needs transformers and torch, which are imported only here.

        Raises:
            TraceError: when the model is dense.
            RecipeError: when the directory holds no config.json.
            UnsupportedError: when transformers has no such model, or its routes cannot be read at
                its routers.
        """
        # By name, because this package stands below the one that knows Hugging Face models and
        # loads without torch.
        found = import_module("moe_replay.transformers").routed_model(config)
        if found is None:
            raise TraceError(
                f"{type(config).__name__ if not isinstance(config, str) else config} describes a dense model, which has no "
                "routes"
            )
        return found


def trace_from_payload(
    rows: Any,
    *,
    token_ids: Any,
    num_prompt_tokens: int,
    model: RoutedModel,
    origin: Origin,
    where: str,
    start: int = 0,
    unwritten: Unwritten = "refuse",
    layer_order: LayerOrder | None = None,
) -> RoutingTrace:
    """Return the trace of the tokens from ``start`` on, out of one array for prompt and completion.

    With P prompt and T sampled tokens, ``rows`` is ``[rows, layers, topk]`` for the P - start + T -
    1 tokens that were fed from ``start`` on. The trace has one row more, for the token sampled
    last, which is ``valid=False``. A prompt of 3 tokens with 2 sampled ones comes as 4 rows and
    becomes a trace of 5. ``rows`` and ``token_ids`` may be numpy arrays, lists, or tensors of torch
    on any device.

    A call that was aborted before it sampled anything has T = 0, and up to P - start rows, as far
    as the engine had fed the prompt; what it had not fed, and the last row, are ``valid=False``.

    ``token_ids`` and the spans of ``origin`` cover all P + T tokens, whatever ``start`` is.
    ``where`` names the request in messages. A row is unwritten when each of its layers names one
    expert K times: a prefix-cache hit that left zeros. An engine keeps one ``layer_order`` for all
    that it reads, so that short payloads add up to a judgement.

    Raises:
        TraceError: when there is no payload, its type cannot hold the model's ids, the rows, layers
            or topk are not as many as the model and the tokens imply, rows are unwritten and not
            allowed to be, or a row is not a possible route.
    """
    token_ids = as_array(token_ids)
    _check_lengths(token_ids, num_prompt_tokens, start, where)
    held = _moe_layers_of(_given(rows, where), model, where, layer_order)
    given = np.ones(len(held), dtype=bool)
    if len(token_ids) == num_prompt_tokens:
        held, given = _of_empty_call(held, len(token_ids) - start, start, where)
    else:
        _check_rows(len(held), len(token_ids), num_prompt_tokens, start, where)
    return _bound(
        held,
        given,
        token_ids=token_ids,
        model=model,
        origin=origin,
        where=where,
        start=start,
        unwritten=unwritten,
    )


def trace_from_split_payload(
    prompt_rows: Any,
    completion_rows: Any,
    *,
    token_ids: Any,
    num_prompt_tokens: int,
    model: RoutedModel,
    origin: Origin,
    where: str,
    start: int = 0,
    unwritten: Unwritten = "refuse",
    layer_order: LayerOrder | None = None,
) -> RoutingTrace:
    """Return the trace of the tokens from ``start`` on, out of arrays for prompt and completion.

    ``prompt_rows`` holds P - start rows and ``completion_rows`` T - 1, as vLLM 0.21 sends them;
    everything else is as in `trace_from_payload`. Pass ``prompt_rows=None`` when the engine leaves
    prompt routes out: these rows are ``valid=False``, and coverage counts them.

    Raises:
        TraceError: as `trace_from_payload`, and when either part has too few or too many rows.
    """
    token_ids = as_array(token_ids)
    _check_lengths(token_ids, num_prompt_tokens, start, where)
    common: dict[str, Any] = {"token_ids": token_ids, "model": model, "origin": origin}
    common |= {"where": where, "start": start, "unwritten": unwritten}
    if len(token_ids) == num_prompt_tokens:
        rows = completion_rows if prompt_rows is None else prompt_rows
        return trace_from_payload(
            rows, num_prompt_tokens=num_prompt_tokens, layer_order=layer_order, **common
        )
    sampled = _moe_layers_of(_given(completion_rows, where), model, where, layer_order)
    num_prompt_rows = num_prompt_tokens - start
    if prompt_rows is None:
        prompt = np.zeros((num_prompt_rows, *sampled.shape[1:]), dtype=sampled.dtype)
    else:
        prompt = _moe_layers_of(_given(prompt_rows, where), model, where, layer_order)
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
        **common,
    )


def unrouted_trace(token_ids: Any, *, model: RoutedModel, origin: Origin) -> RoutingTrace:
    """Return a trace without any route, for a call that gave none, so that its rows are counted."""
    token_ids = as_array(token_ids)
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
    if not 1 <= num_prompt_tokens <= len(token_ids):
        raise TraceError(
            f"{where}: {num_prompt_tokens} prompt tokens of {len(token_ids)}, expected 1 to {len(token_ids)}; "
            "token_ids must hold prompt and completion"
        )
    last = min(num_prompt_tokens, len(token_ids) - 1)
    if not 0 <= start <= last:
        raise TraceError(
            f"{where}: rows start at token {start}, expected 0 to {last}, the end of the prompt; engines return every row "
            "of what they sample"
        )


def _given(rows: Any, where: str) -> Shaped[np.ndarray, "..."]:
    """Return a payload as an array; raise when there is none."""
    if rows is None:
        raise TraceError(
            f"{where}: the payload is None, expected routes of [rows, layers, topk]: the engine recorded none. vLLM "
            "needs enable_return_routed_experts=True (--enable-return-routed-experts of vllm serve); SGLang needs "
            "--enable-return-routed-experts, and return_routed_experts in each request. When rows without routes are "
            "meant, make an unrouted_trace"
        )
    return as_array(rows)


def _moe_layers_of(
    rows: Shaped[np.ndarray, "..."],
    model: RoutedModel,
    where: str,
    layer_order: LayerOrder | None,
) -> Integer[np.ndarray, "rows moe_layers topk"]:
    """Return the MoE layers of a payload in either layer form."""
    if rows.ndim != 3 or not np.issubdtype(rows.dtype, np.integer):
        raise TraceError(
            f"{where}: the payload is {rows.dtype}{list(rows.shape)}, expected integers of [rows, layers, topk]"
        )
    check_holds_ids(rows, model.num_experts, where=where)
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
    (LayerOrder() if layer_order is None else layer_order).check(
        rows, moe_layers=model.moe_layers, num_experts=model.num_experts, where=where
    )
    return rows[:, list(model.moe_layers)]


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


def _of_empty_call(
    rows: Integer[np.ndarray, "rows layers topk"], num_fed: int, start: int, where: str
) -> tuple[Integer[np.ndarray, "fed layers topk"], Bool[np.ndarray, " fed"]]:
    """Return the rows of a call that sampled nothing, without the last, and which were given."""
    if len(rows) > num_fed:
        raise TraceError(
            f"{where}: the payload has {len(rows)} rows, expected at most {num_fed}: nothing was sampled, and only the "
            f"prompt can have been fed, from token {start} on"
        )
    kept = rows[: num_fed - 1]
    missing = np.zeros((num_fed - 1 - len(kept), *rows.shape[1:]), dtype=rows.dtype)
    return np.concatenate([kept, missing]), np.arange(num_fed - 1) < len(kept)


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
            owned(np.concatenate([rows, np.zeros_like(rows, shape=(1, *rows.shape[1:]))])),
            token_ids=token_ids[start:],
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
        return _unwritten_of_one(rows, given, start, unwritten, where)
    if unwritten == "trust":
        raise TraceError(
            f"{where}: unwritten='trust' is for models with one expert per token; of {rows.shape[2]} a router names none twice"
        )
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


def _unwritten_of_one(
    rows: Integer[np.ndarray, "rows layers 1"],
    given: Bool[np.ndarray, " rows"],
    start: int,
    unwritten: Unwritten,
    where: str,
) -> Bool[np.ndarray, " rows"]:
    """Return that all rows are written, or raise: with top-1, zeros are a route to expert 0."""
    if unwritten == "invalid":
        raise TraceError(
            f"{where}: with one expert per token an unwritten row looks like a route to expert 0, so unwritten rows "
            "cannot be distinguished; turn the engine's prefix cache off"
        )
    blank = (rows == 0).all(axis=(1, 2)) & given
    if blank.any() and unwritten == "refuse":
        raise TraceError(
            f"{where}: {int(blank.sum())} of {len(rows)} rows name expert 0 in all {rows.shape[1]} layers, the first is that of "
            f"token {start + int(blank.argmax())}; with one expert per token a row that nobody wrote looks the same: turn the "
            "engine's prefix cache off and pass unwritten='trust'"
        )
    return np.zeros(len(rows), dtype=bool)
