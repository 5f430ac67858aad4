"""Completions made of what vLLM returns, whose routes have a form of their own in each release.

=============  =====================================================================================
release        what comes back for P prompt and T sampled tokens
=============  =====================================================================================
0.14 to 0.20   one array of P + T - 1 rows, all decoder layers, int32; nothing after an abort or a
               stop string
0.21           two arrays, P and T - 1 rows, MoE layers only, int16; rows of prefix-cache hits are
               zeros
0.22 to 0.30   one array of P + T - 1 rows, all decoder layers, uint8 up to 256 experts and uint16
               above
0.31 on        the same array
=============  =====================================================================================

In process an array is a numpy array; over HTTP it is base64 of a ``.npy`` file, or nested lists
(0.21).

In: outputs of vLLM, objects or JSON. Out: Completion, RoutingTrace.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, Integer, Shaped
from packaging.version import InvalidVersion, Version

from moe_replay.checkpoint.facts import ModelFacts
from moe_replay.engines.noise import refuse_no_numbers
from moe_replay.engines.types import (
    FINISH_REASONS,
    Completion,
    EngineDescription,
    FinishReason,
    Request,
)
from moe_replay.errors import CodecError, EngineError, TraceError, UnsupportedError
from moe_replay.routing import (
    LayerOrder,
    Origin,
    RoutedModel,
    RoutingTrace,
    trace_from_payload,
    trace_from_split_payload,
    unrouted_trace,
)
from moe_replay.routing.candidates import Candidates

FLAG = "--enable-return-routed-experts"
"""The flag of ``vllm serve`` without which no routes come back."""

_OLDEST, _SPLIT, _NARROW = Version("0.14"), Version("0.21"), Version("0.22")
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutePayload:
    """The route fields of one completion, as arrays."""

    completion_rows: Shaped[np.ndarray, "..."] | None
    """``routed_experts`` of the completion: all rows; in the split form, of its sampled tokens."""
    prompt_rows: Shaped[np.ndarray, "..."] | None = None
    """``prompt_routed_experts`` of the request; None except in the split form."""


def completion_of(
    output: Any,
    *,
    request: Request,
    number: int,
    facts: ModelFacts,
    description: EngineDescription,
    policy_version: int,
    layer_order: LayerOrder | None = None,
    candidates: Candidates | None = None,
) -> Completion:
    """Return completion ``number`` of ``request`` from vLLM's last output for it.

    ``candidates`` are those of all tokens that were drawn, None where they are not kept.

    Raises:
        EngineError: when it ended in an unknown way, or routes are missing.
        DivergedError: when a token was drawn from logits that are not finite.
        TraceError: when the routes are not those of the tokens.
    """
    (sampled,) = output.outputs
    where = f"vllm: request {request.request_id}, completion {number}"
    finish_reason = FINISH_REASONS.get(sampled.finish_reason)
    if finish_reason is None:
        raise EngineError(
            f"{where} ended with finish_reason {sampled.finish_reason!r}, expected one of "
            f"{list(FINISH_REASONS)}"
        )
    token_ids = list(sampled.token_ids)
    drawn = zip(sampled.logprobs or (), token_ids, strict=True)
    logprobs = [by_token[token].logprob for by_token, token in drawn]
    return make_completion(
        np.array(token_ids, dtype=np.int32),
        np.array(logprobs, dtype=np.float32),
        RoutePayload(completion_rows=sampled.routed_experts),
        finish_reason=finish_reason,
        request=request,
        facts=facts,
        description=description,
        policy_version=policy_version,
        layer_order=layer_order,
        candidates=None if candidates is None else _emitted(candidates, len(token_ids), where),
        where=where,
    )


def _emitted(candidates: Candidates, length: int, where: str) -> Candidates:
    """Return the candidates of the tokens that came back; of an aborted call more were drawn."""
    if len(candidates) < length:
        raise EngineError(
            f"{where}: candidates of {len(candidates)} tokens were kept, expected {length}: vLLM's "
            "worker has drawn others, or was started again"
        )
    return candidates.crop(length)


def make_completion(
    token_ids: Int32[np.ndarray, " completion"],
    rollout_logprobs: Float32[np.ndarray, " completion"],
    payload: RoutePayload,
    *,
    finish_reason: FinishReason,
    request: Request,
    facts: ModelFacts,
    description: EngineDescription,
    policy_version: int,
    layer_order: LayerOrder | None,
    candidates: Candidates | None = None,
    where: str,
) -> Completion:
    """Return a completion from its parts, whichever way they came from vLLM.

    ``layer_order`` belongs to one engine or server: what its payloads show of their layers adds up.

    Raises:
        EngineError: when routes are missing.
        DivergedError: when a token was drawn from logits that are not finite.
        TraceError: when the routes are not those of the tokens.
    """
    refuse_no_numbers(rollout_logprobs, where=where, policy_version=policy_version)
    trace: RoutingTrace | None = None
    if description.records_routes:
        assert facts.routed is not None
        sequence = request.sequence(token_ids)
        trace = trace_from_vllm(
            payload,
            version=description.version,
            token_ids=sequence,
            num_prompt_tokens=len(request.prompt_ids),
            model=facts.routed,
            origin=description.origin(policy_version=policy_version, num_rows=len(sequence)),
            was_cut=finish_reason is FinishReason.ABORTED,
            where=where,
            layer_order=layer_order,
        )
    return Completion(
        token_ids=token_ids,
        rollout_logprobs=rollout_logprobs,
        trace=trace,
        finish_reason=finish_reason,
        policy_version=policy_version,
        candidates=candidates,
    )


def payload_of_json(
    response: Mapping[str, Any], choice: Mapping[str, Any], *, max_bytes: int
) -> RoutePayload:
    """Return the route fields of one choice of an HTTP response, decoded.

    Raises:
        CodecError: when a field is not an array, is damaged, or holds more than ``max_bytes``.
    """
    prompt = choice.get("prompt_routed_experts", response.get("prompt_routed_experts"))
    return RoutePayload(
        completion_rows=_decode(choice.get("routed_experts"), max_bytes),
        prompt_rows=_decode(prompt, max_bytes),
    )


def trace_from_vllm(
    payload: RoutePayload,
    *,
    version: str,
    token_ids: Integer[np.ndarray, " tokens"],
    num_prompt_tokens: int,
    model: RoutedModel,
    origin: Origin,
    was_cut: bool,
    where: str,
    layer_order: LayerOrder | None = None,
) -> RoutingTrace:
    """Return the trace of one completion, whichever form this release of vLLM uses.

    ``was_cut`` says that the completion was aborted or ended by a stop string: older releases then
    return nothing, as all do for one that was aborted before its first token, and all its rows are
    ``valid=False``. So are prompt rows that 0.21 served from its prefix cache.

    Raises:
        UnsupportedError: when the release returns no routes at all.
        EngineError: when routes are missing that the release returns.
        TraceError: when they are not those of ``token_ids`` in ``model``.
    """
    release = check_version(version)
    rows, prompt = payload.completion_rows, payload.prompt_rows
    if rows is None:
        if was_cut and (release < _SPLIT or len(token_ids) == num_prompt_tokens):
            return unrouted_trace(token_ids, model=model, origin=origin)
        raise EngineError(
            f"{where}: vLLM {version} returned no routes; it was started without {FLAG} "
            "(enable_return_routed_experts=True), or the request went to another server"
        )
    is_split = _SPLIT <= release < _NARROW
    if is_split != (prompt is not None):
        raise TraceError(
            f"{where}: vLLM {version} returned routes {'without' if is_split else 'with'} an array "
            "for the prompt, expected "
            f"{'two arrays' if is_split else 'one array for prompt and completion'} from this "
            "release; the server runs another one than it says"
        )
    common = {
        "token_ids": token_ids,
        "num_prompt_tokens": num_prompt_tokens,
        "model": model,
        "origin": origin,
        "where": where,
        "layer_order": layer_order,
    }
    if prompt is not None:
        return trace_from_split_payload(prompt, rows, **common, unwritten="invalid")
    return trace_from_payload(rows, **common)


def check_version(version: str) -> Version:
    """Return the release part of a vLLM version.

    Raises:
        UnsupportedError: when it is not a version, or older than the first that returns routes.
    """
    try:
        release = Version(Version(version).base_version)
    except InvalidVersion as error:
        raise UnsupportedError(
            f"{version!r} is not a version of vLLM; routes cannot be read without one"
        ) from error
    if release < _OLDEST:
        raise UnsupportedError(
            f"vLLM {version} returns no routes; the first release that does is {_OLDEST}, and 0.30 "
            "is the one tested here"
        )
    return release


def _decode(field: Any, max_bytes: int) -> Shaped[np.ndarray, "..."] | None:
    if field is None:
        return None
    if isinstance(field, list):
        return _from_lists(field)
    if not isinstance(field, str):
        raise CodecError(
            f"routes came as {type(field).__name__}, expected base64 of a .npy file or nested lists"
        )
    if len(field) * 3 // 4 > max_bytes:
        raise CodecError(
            f"routes came as {len(field)} base64 characters, more than the limit of {max_bytes} bytes "
            "for one completion"
        )
    try:
        content = base64.b64decode(field, validate=True)
    except ValueError as error:
        raise CodecError(f"routes are not valid base64: {error}") from error
    return _read_npy(content)


def _read_npy(content: bytes) -> Shaped[np.ndarray, "..."]:
    """Read a ``.npy`` file after checking its header against its length.

    For ``uint8[5, 48, 8]`` exactly 1,920 bytes must follow the header.
    """
    file = io.BytesIO(content)
    try:
        shape, is_fortran, dtype = _HEADERS[np.lib.format.read_magic(file)](file)
    except (ValueError, EOFError, KeyError) as error:
        raise CodecError(
            f"routes start with {content[:8]!r}, expected a .npy file of format 1 or 2 with a sound "
            f"header: {error!r}"
        ) from error
    if is_fortran or not np.issubdtype(dtype, np.integer) or len(shape) != 3:
        raise CodecError(
            f"routes are {dtype}{list(shape)}{' in Fortran order' if is_fortran else ''}, expected "
            "integers of [rows, layers, topk] in C order"
        )
    body = content[file.tell() :]
    expected = dtype.itemsize * math.prod(shape)
    if len(body) != expected or min(shape) < 0:
        raise CodecError(
            f"routes hold {len(body)} bytes after the header, expected {expected} for "
            f"{dtype}{list(shape)}; the response was cut"
        )
    return np.frombuffer(body, dtype=dtype).reshape(shape)


def _from_lists(field: list[Any]) -> Shaped[np.ndarray, "..."]:
    try:
        rows = np.array(field)
    except ValueError as error:
        raise CodecError(f"routes are nested lists of different lengths: {error}") from error
    # Refused here, as nothing below could say that the values came as nested lists.
    if rows.ndim != 3 or rows.dtype.kind not in "iu":
        raise CodecError(
            f"routes are nested lists of {rows.dtype} with {rows.ndim} levels, expected integers with 3"
        )
    return rows
