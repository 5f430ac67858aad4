"""Makes traces of what inference engines send: each form is recognised by its shape alone.

Engines differ in four ways, and each difference shows in the shape. *Layers*: all decoder layers
(dense ones hold zeros or leftovers) or MoE layers only. *Parts*: one array for prompt and
completion, or two. *Rows*: one for each token that was fed, which is every token but the last
sampled one, from the first token or from a later ``start``. *Width*: any integer type. Whatever
fits no form raises with the count that was expected.
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
    from jaxtyping import Bool, Integer

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
    call = _Call(
        token_ids=as_array(token_ids),
        num_prompt_tokens=num_prompt_tokens,
        model=model,
        origin=origin,
        where=where,
        start=start,
        unwritten=unwritten,
        layer_order=LayerOrder() if layer_order is None else layer_order,
    )
    return call.trace(call.moe_layers_of(rows))


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
    call = _Call(
        token_ids=as_array(token_ids),
        num_prompt_tokens=num_prompt_tokens,
        model=model,
        origin=origin,
        where=where,
        start=start,
        unwritten=unwritten,
        layer_order=LayerOrder() if layer_order is None else layer_order,
    )
    if not call.num_sampled:
        return call.trace(
            call.moe_layers_of(completion_rows if prompt_rows is None else prompt_rows)
        )
    sampled = call.moe_layers_of(completion_rows)
    num_prompt_rows, num_fed = num_prompt_tokens - start, call.num_sampled - 1
    if prompt_rows is None:
        prompt = np.zeros((num_prompt_rows, *sampled.shape[1:]), dtype=sampled.dtype)
    else:
        prompt = call.moe_layers_of(prompt_rows)
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
    given = np.arange(num_prompt_rows + num_fed) >= (num_prompt_rows if prompt_rows is None else 0)
    return call.bound(np.concatenate([prompt, sampled]), given)


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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Call:
    """One call of an engine, and how its payload becomes a trace."""

    token_ids: Integer[np.ndarray, " tokens"]
    num_prompt_tokens: int
    model: RoutedModel
    origin: Origin
    where: str
    start: int
    unwritten: Unwritten
    layer_order: LayerOrder

    def __post_init__(self) -> None:
        num_tokens = len(self.token_ids)
        if not 1 <= self.num_prompt_tokens <= num_tokens:
            raise TraceError(
                f"{self.where}: {self.num_prompt_tokens} prompt tokens of {num_tokens}, expected 1 to {num_tokens}; "
                "token_ids must hold prompt and completion"
            )
        last = min(self.num_prompt_tokens, num_tokens - 1)
        if not 0 <= self.start <= last:
            raise TraceError(
                f"{self.where}: rows start at token {self.start}, expected 0 to {last}, the end of the prompt; engines return "
                "every row of what they sample"
            )
        covered = self.origin.spans[-1].stop if self.origin.spans else 0
        if covered != num_tokens:
            raise TraceError(
                f"{self.where}: the policy spans of the origin cover {covered} rows, expected {num_tokens}: all prompt and "
                "sampled tokens, also when the payload starts later"
            )

    @property
    def num_sampled(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    def moe_layers_of(self, payload: Any) -> Integer[np.ndarray, "rows moe_layers topk"]:
        """Return the MoE layers of a payload in either layer form."""
        where, model = self.where, self.model
        if payload is None:
            raise TraceError(
                f"{where}: the payload is None, expected routes of [rows, layers, topk]: the engine recorded none. vLLM "
                "needs enable_return_routed_experts=True (--enable-return-routed-experts of vllm serve); SGLang needs "
                "--enable-return-routed-experts, and return_routed_experts in each request. When rows without routes are "
                "meant, make an unrouted_trace"
            )
        rows = as_array(payload)
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
        self.layer_order.check(
            rows, moe_layers=model.moe_layers, num_experts=model.num_experts, where=where
        )
        return rows[:, list(model.moe_layers)]

    def trace(self, rows: Integer[np.ndarray, "rows layers topk"]) -> RoutingTrace:
        """Return the trace of all rows of a call; one that sampled nothing may have fed less."""
        num_fed = len(self.token_ids) - self.start - 1
        if self.num_sampled:
            self._check_rows(len(rows), num_fed)
            return self.bound(rows, np.ones(num_fed, dtype=bool))
        if len(rows) > num_fed + 1:
            raise TraceError(
                f"{self.where}: the payload has {len(rows)} rows, expected at most {num_fed + 1}: nothing was sampled, and only "
                f"the prompt can have been fed, from token {self.start} on"
            )
        kept = rows[:num_fed]
        missing = np.zeros((num_fed - len(kept), *rows.shape[1:]), dtype=rows.dtype)
        return self.bound(np.concatenate([kept, missing]), np.arange(num_fed) < len(kept))

    def _check_rows(self, num_rows: int, expected: int) -> None:
        if num_rows == expected:
            return
        causes = {
            expected
            + 1: "a row for the last sampled token, which is never fed, was added or padded",
            expected
            + self.start: f"the engine ignored the start of {self.start}: crop nothing, pass start=0",
            self.num_sampled - 1: "these are the rows of the completion alone",
            self.num_prompt_tokens: "these are the rows of the prompt alone",
        }
        cause = causes.get(
            num_rows, "rows were dropped by preemption, or token_ids were re-tokenised"
        )
        raise TraceError(
            f"{self.where}: the payload has {num_rows} rows, expected {expected}: {self.num_prompt_tokens} prompt and "
            f"{self.num_sampled} sampled tokens, from token {self.start} on, less the last one; probably {cause}"
        )

    def bound(
        self, rows: Integer[np.ndarray, "rows layers topk"], given: Bool[np.ndarray, " rows"]
    ) -> RoutingTrace:
        """Add the row of the last token and bind everything to the tokens."""
        valid = np.append(given & ~self._unwritten_rows(rows, given), False)
        try:
            return RoutingTrace.record(
                owned(np.concatenate([rows, np.zeros_like(rows, shape=(1, *rows.shape[1:]))])),
                token_ids=self.token_ids[self.start :],
                valid=valid,
                layers=self.model.moe_layers,
                num_experts=self.model.num_experts,
                origin=self.origin.crop(self.start, len(self.token_ids)),
            )
        except TraceError as error:
            raise TraceError(f"{self.where}: {error}") from error

    def _unwritten_rows(
        self, rows: Integer[np.ndarray, "rows layers topk"], given: Bool[np.ndarray, " rows"]
    ) -> Bool[np.ndarray, " rows"]:
        """Return the rows to be marked unwritten; with top-1, zeros are a route to expert 0."""
        where, (_, num_layers, topk) = self.where, rows.shape
        if topk == 1 and self.unwritten == "invalid":
            raise TraceError(
                f"{where}: with one expert per token an unwritten row looks like a route to expert 0, so unwritten rows "
                "cannot be distinguished; turn the engine's prefix cache off"
            )
        if topk > 1 and self.unwritten == "trust":
            raise TraceError(
                f"{where}: unwritten='trust' is for models with one expert per token; of {topk} a router names none twice"
            )
        # A row whose first layer is a route has been written, so the other layers are seldom read.
        first = 0 if topk == 1 else rows[:, 0, :1]
        blank = (rows[:, 0] == first).all(axis=1) & given
        blank[blank] = (rows[blank] == (0 if topk == 1 else rows[blank, :, :1])).all(axis=(1, 2))
        if not blank.any() or self.unwritten == "invalid":
            return blank
        if self.unwritten == "trust":
            return np.zeros_like(blank)
        row = int(blank.argmax())
        counted, token = f"{where}: {int(blank.sum())} of {len(rows)} rows", self.start + row
        if topk == 1:
            raise TraceError(
                f"{counted} name expert 0 in all {num_layers} layers, the first is that of token {token}; with one expert "
                "per token a row that nobody wrote looks the same: turn the engine's prefix cache off and pass "
                "unwritten='trust'"
            )
        raise TraceError(
            f"{counted} are unwritten, the first is that of token {token}, which names expert {int(rows[row, 0, 0])} {topk} "
            "times in every layer; the engine served them from its prefix cache or did not capture them: turn prefix "
            "caching off, or pass unwritten='invalid' to route these rows live and count them"
        )
