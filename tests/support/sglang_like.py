"""A server that speaks the HTTP API of SGLang 0.5.23 over any engine: SGLang needs a GPU.

It answers ``/server_info``, ``/model_info``, ``/health``, ``/health_generate``, ``/generate``,
``/abort_request``, ``/update_weights_from_disk``, ``/flush_cache`` with the fields, types and
status codes of the real one, refuses fields that the real one does not know, and does what
surprises there: completions are cut short where the context ends, and a failed update leaves the
weight version alone.

In: an engine. Out: an ASGI application.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import torch
from jaxtyping import Int32
from safetensors.torch import load_file
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from moe_replay.engines.types import Completion, Engine, FinishReason, Request, SamplingParams
from moe_replay.errors import MoeReplayError
from moe_replay.routing import RoutingTrace

VERSION = "0.5.23"
"""Release whose answers are imitated."""

_REQUEST_FIELDS = frozenset(
    (
        *("input_ids", "sampling_params", "return_logprob", "return_text_in_logprobs"),
        *("return_routed_experts", "routed_experts_start_len", "stream", "rid", "text"),
    )
)
_SAMPLING_FIELDS = frozenset(
    (
        *("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "min_new_tokens"),
        *("frequency_penalty", "presence_penalty", "repetition_penalty", "sampling_seed"),
        "logit_bias",
        *("stop", "stop_token_ids", "ignore_eos", "no_stop_trim", "skip_special_tokens"),
    )
)
# SGLang's own default, used for all requests without a seed under deterministic inference.
_SEED = 42
_DETERMINISTIC = "enable_deterministic_inference"
# What SGLang keeps free at the end of the context, and below that for what is sampled.
_TAIL, _LEAST_SAMPLED = 1, 5


class SglangLike:
    """The server. ``options`` are entries of ``/server_info`` to answer otherwise.

    It draws by the seeds of requests, unless ``enable_deterministic_inference`` is False among the
    options: then each completion has noise of its own, whatever was asked before.

    ``original_logprobs`` imitates ``SGLANG_RETURN_ORIGINAL_LOGPROB`` for greedy requests.
    Completions whose number, counted over all calls, is in ``retracted`` are said to have been
    retracted once, and their routes come back otherwise.

    Example:
        >>> with listening(SglangLike(engine, num_decoder_layers=3).application()) as url: ...
    """

    def __init__(
        self,
        engine: Engine,
        *,
        num_decoder_layers: int,
        token: str | None = None,
        original_logprobs: bool = False,
        retracted: frozenset[int] = frozenset(),
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._engine, self._num_layers, self._token = engine, num_decoder_layers, token
        self._original_logprobs, self._retracted = original_logprobs, retracted
        self._options = {_DETERMINISTIC: True, **(options or {})}
        self.aborted: list[str] = []
        """Names of the requests that clients asked to abort."""
        self._weight_version = "default"
        self._num_completions = 0
        self._turn = threading.Lock()

    @property
    def _max_request_length(self) -> int:
        return self._engine.description.max_context_length - _TAIL

    def application(self) -> Starlette:
        """Return the ASGI application."""
        return Starlette(
            routes=[
                Route("/server_info", self._server_info, methods=["GET"]),
                Route("/model_info", self._model_info, methods=["GET"]),
                Route("/health", self._health, methods=["GET"]),
                Route("/health_generate", self._health, methods=["GET"]),
                Route("/abort_request", self._abort, methods=["POST"]),
                Route("/generate", self._generate, methods=["POST", "PUT"]),
                Route("/update_weights_from_disk", self._update_weights, methods=["POST"]),
                Route("/flush_cache", self._flush_cache, methods=["GET", "POST"]),
            ]
        )

    def _refusal(self, request: HttpRequest) -> Response | None:
        given = request.headers.get("authorization")
        if self._token is not None and given != f"Bearer {self._token}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        return None

    async def _server_info(self, request: HttpRequest) -> Response:
        description = self._engine.description
        fields = {
            "dtype": description.dtype,
            "enable_return_routed_experts": description.records_routes,
            "speculative_algorithm": None,
            "enable_hierarchical_cache": False,
            "disaggregation_mode": "null",
            "pp_size": 1,
            "quantization": None,
            "max_total_num_tokens": 1 << 20,
            "max_req_input_len": self._max_request_length - _LEAST_SAMPLED,
            "internal_states": [{}],
            "version": VERSION,
        }
        return self._refusal(request) or JSONResponse({**fields, **self._options})

    async def _model_info(self, request: HttpRequest) -> Response:
        fields = {"is_generation": True, "weight_version": self._weight_version}
        return self._refusal(request) or JSONResponse(fields)

    async def _health(self, request: HttpRequest) -> Response:
        return Response()

    async def _abort(self, request: HttpRequest) -> Response:
        if refusal := self._refusal(request):
            return refusal
        self.aborted.append(json.loads(await request.body())["rid"])
        return Response()

    async def _generate(self, request: HttpRequest) -> Response:
        if refusal := self._refusal(request):
            return refusal
        return await anyio.to_thread.run_sync(self._answer, json.loads(await request.body()))

    async def _flush_cache(self, request: HttpRequest) -> Response:
        return self._refusal(request) or PlainTextResponse("Cache flushed.\n")

    async def _update_weights(self, request: HttpRequest) -> Response:
        if refusal := self._refusal(request):
            return refusal
        return await anyio.to_thread.run_sync(self._update, json.loads(await request.body()))

    def _update(self, call: dict[str, Any]) -> Response:
        success, message = True, "Succeeded to update model weights."
        with self._turn:
            try:
                self._engine.load_weights(
                    _tensors(Path(call["model_path"])),
                    policy_version=self._engine.policy_version + 1,
                )
                self._weight_version = call.get("weight_version") or self._weight_version
            except (MoeReplayError, OSError) as error:
                success, message = False, f"Failed to update weights: {error}."
        fields = {"success": success, "message": message, "num_paused_requests": 0}
        return JSONResponse(fields, 200 if success else 400)

    def _answer(self, call: dict[str, Any]) -> Response:
        params = call["sampling_params"]
        unknown = (set(call) - _REQUEST_FIELDS) | (set(params) - _SAMPLING_FIELDS)
        if unknown:
            return JSONResponse({"error": {"message": f"unknown fields {sorted(unknown)}"}}, 400)
        try:
            with self._turn:
                return JSONResponse(self._complete(call["input_ids"], params, call))
        except MoeReplayError as error:
            return JSONResponse({"error": {"message": str(error)}}, 400)

    def _complete(
        self, prompt: list[int], params: dict[str, Any], call: dict[str, Any]
    ) -> dict[str, Any]:
        number, self._num_completions = self._num_completions, self._num_completions + 1
        seed = params.get("sampling_seed", _SEED) if self._options[_DETERMINISTIC] else number
        request = Request(
            # The seed alone decides the noise, as under SGLang's deterministic inference.
            request_id=seed,
            prompt_ids=np.array(prompt, dtype=np.int32),
            num_generations=1,
        )
        is_greedy = params["temperature"] == 0 or params["top_k"] == 1
        sampling = SamplingParams(
            max_completion_length=min(
                params["max_new_tokens"], self._max_request_length - len(prompt) - 1
            ),
            temperature=1.0 if is_greedy and self._original_logprobs else params["temperature"],
            top_p=params["top_p"],
            top_k=max(params["top_k"], 0),
            stop_token_ids=tuple(params["stop_token_ids"]),
        )
        (group,) = self._engine.generate([request], sampling)
        (completion,) = group.completions
        return self._answer_of(completion, len(prompt), number in self._retracted, call)

    def _answer_of(
        self,
        completion: Completion,
        num_prompt_tokens: int,
        was_retracted: bool,
        call: dict[str, Any],
    ) -> dict[str, Any]:
        tokens = completion.token_ids.tolist()
        is_stop = completion.finish_reason is FinishReason.STOP
        meta: dict[str, Any] = {
            "id": "0",
            "finish_reason": {"type": "stop", "matched": tokens[-1]}
            if is_stop
            else {"type": "length", "length": len(tokens)},
            "prompt_tokens": num_prompt_tokens,
            "weight_version": self._weight_version,
            "num_retractions": int(was_retracted),
            "output_token_logprobs": [
                [logprob, token, None]
                for logprob, token in zip(completion.rollout_logprobs.tolist(), tokens, strict=True)
            ],
            "reasoning_tokens": 0,
            "completion_tokens": len(tokens),
            "cached_tokens": 0,
            "e2e_latency": 0.01,
        }
        if call["return_routed_experts"] and completion.trace is not None:
            rows = self._rows(completion.trace)[call["routed_experts_start_len"] :]
            rows = rows[::-1] if was_retracted else rows
            meta["routed_experts"] = base64.b64encode(rows.astype("<i4").tobytes()).decode()
        return {"text": "", "output_ids": tokens, "meta_info": meta}

    def _rows(self, trace: RoutingTrace) -> Int32[np.ndarray, "rows layers topk"]:
        """Return the rows of all fed tokens, with zeros for dense layers."""
        rows = np.zeros((len(trace) - 1, self._num_layers, trace.topk), dtype=np.int32)
        rows[:, list(trace.layers)] = trace.expert_ids[:-1]
        return rows


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"Cannot find any model weights with `{folder}`")
    for path in paths:
        yield from load_file(path).items()
