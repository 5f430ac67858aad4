"""What SGLang's HTTP server sends and accepts, as the types of every engine.

=================  ==============================================================================
release            what comes back
=================  ==============================================================================
0.5.7              routes, but physical expert ids under expert load balancing: refused
0.5.8 to 0.5.11    logical ids, but retracted requests, whose routes are recomputed, are not
                   named: refused
0.5.12 on          ``num_retractions``: routes of retracted completions are ``valid=False``
=================  ==============================================================================

Routes are base64 of int32 without a header, ``[rows, layers, topk]`` in C order, all decoder
layers, dense ones zeros. They are asked for from the first token on, because 0.5.9 to 0.5.11
silently ignored any other start. ``output_token_logprobs`` are those of ``softmax(logits /
temperature)`` over the full vocabulary, before top-k and top-p (SGLang 0.5.23,
``Sampler.forward``), unless the server runs with ``SGLANG_RETURN_ORIGINAL_LOGPROB``.

In: JSON of a server. Out: descriptions, completions.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int32
from packaging.version import InvalidVersion, Version

from moe_replay.checkpoint.facts import ModelFacts
from moe_replay.engines.lifecycle import describe
from moe_replay.engines.serve.messages import PolicyName
from moe_replay.engines.servers.contract import (
    NEUTRAL,
    Ask,
    finish_reason_of,
    refuse_candidates,
)
from moe_replay.engines.types import (
    Completion,
    EngineDescription,
    FinishReason,
    SamplingParams,
)
from moe_replay.engines.vllm.wire import FLAG
from moe_replay.errors import CodecError, EngineError, RecipeError, UnsupportedError
from moe_replay.routing import (
    LayerOrder,
    RoutedModel,
    RoutingTrace,
    trace_from_payload,
    unrouted_trace,
)

_OLDEST = Version("0.5.12")
_DTYPES = {"float": "float32", "half": "float16"}

# Option of the server -> the value that replay needs, and what any other one does.
_OPTIONS: Mapping[str, tuple[Any, str]] = {
    "speculative_algorithm": (None, "tokens are drafted by another model, whose routers run too"),
    "enable_hierarchical_cache": (
        False,
        "prompt rows from host memory have the routes of whatever held their slot before (sglang "
        "#26975)",
    ),
    "enable_lmcache": (
        False,
        "prompt rows from the outer cache have the routes of whatever held their slot before",
    ),
    "enable_hisparse": (False, "rows move between slots, and the captured routes do not"),
    "disaggregation_mode": ("null", "routes of the prompt stay on the server that ran it"),
    "pp_size": (1, "each pipeline stage captures the routes of its own layers only"),
    "quantization": (None, "pushed weights are of full precision"),
}


def check_version(version: str) -> None:
    """Raise `UnsupportedError` for a release whose routes may not belong to the sampled tokens."""
    try:
        release = Version(Version(version).base_version)
    except InvalidVersion as error:
        raise UnsupportedError(
            f"{version!r} is not a version of SGLang; routes cannot be read without one"
        ) from error
    if release < _OLDEST:
        raise UnsupportedError(
            f"SGLang {version} does not say whether a request was retracted, and the routes of one "
            "that was are recomputed, not those that its tokens were sampled with; the first release "
            f"that says so is {_OLDEST}: install it or a newer one"
        )


def read_description(told: Any, facts: ModelFacts, url: str) -> EngineDescription:
    """Return what a server is, out of its ``/server_info``.

    Raises:
        RecipeError: when this is not an SGLang server.
        UnsupportedError: when its release or an option prevents routes that belong to the tokens.
    """
    needed = {"version": str, "dtype": str, "max_req_input_len": int}
    if not isinstance(told, dict) or any(
        not isinstance(told.get(key), kind) for key, kind in needed.items()
    ):
        raise RecipeError(
            f"{url}/server_info lacks {', '.join(needed)}; it is not an SGLang server of a known "
            f"release: start one with `python -m sglang.launch_server --model-path MODEL {FLAG}`"
        )
    check_version(told["version"])
    for option, (expected, reason) in _OPTIONS.items():
        got = told.get(option, expected)
        if got != expected and not (got is None and expected is False):
            raise UnsupportedError(
                f"{url} runs with {option} = {got!r}, expected {expected!r}: {reason}; start it without "
                f"--{option.replace('_', '-')}"
            )
    return describe(
        facts,
        name="sglang",
        version=told["version"],
        dtype=_DTYPES.get(told["dtype"], told["dtype"]),
        record_routes=told.get("enable_return_routed_experts") is True,
        # SGLang cuts longer completions short and reports them as complete.
        max_context_length=min(facts.max_context_length, told["max_req_input_len"]),
    )


def generate_message(ask: Ask, number: int, *, facts: ModelFacts, rid: str) -> dict[str, Any]:
    """Return the body of a ``/generate`` call for completion ``number``, which ``rid`` can abort.

    One call a completion: all 16 of a prompt at 32k tokens would be 1 GB of JSON. Every option is
    set, so that defaults of the server or the checkpoint change nothing.

    Raises:
        UnsupportedError: when candidates are asked for.
    """
    request, sampling = ask.request, ask.sampling
    refuse_candidates(sampling, "an SGLang server")
    return {
        "rid": rid,
        "input_ids": request.prompt_ids.tolist(),
        "sampling_params": {
            "max_new_tokens": sampling.max_completion_length,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            **NEUTRAL,
            "min_p": sampling.min_p,
            "min_new_tokens": 0,
            "stop": [],
            "stop_token_ids": sorted({*facts.eos_ids, *sampling.stop_token_ids}),
            "ignore_eos": False,
            "no_stop_trim": True,
            "skip_special_tokens": False,
            "sampling_seed": _sampling_seed(sampling.seed, request.request_id, number),
        },
        "return_logprob": True,
        "return_text_in_logprobs": False,
        "return_routed_experts": ask.description.records_routes,
        "routed_experts_start_len": 0,
        "stream": False,
    }


def read_completion(
    answer: Any, ask: Ask, *, facts: ModelFacts, layer_order: LayerOrder, where: str
) -> tuple[Completion, PolicyName]:
    """Return the completion in one entry of an answer, and the weights that it was sampled with.

    ``layer_order`` belongs to its server. A completion that was retracted has log-probabilities of
    its first run and routes of a later one; all its rows are ``valid=False``, and coverage counts
    them.

    Raises:
        EngineError: when the entry is damaged, cut, or ended in an unknown way.
        TraceError: when its routes are not those of its tokens.
    """
    try:
        meta = answer["meta_info"]
        logprobs, tokens = zip(
            *((float(entry[0]), int(entry[1])) for entry in meta["output_token_logprobs"]),
            strict=True,
        )
        told = {
            "prompt_tokens": meta["prompt_tokens"],
            "completion_tokens": meta["completion_tokens"],
        }
        reason, num_retractions = meta["finish_reason"], int(meta["num_retractions"])
        policy = PolicyName.read(meta["weight_version"])
        token_ids = np.array(tokens, dtype=np.int32)
        versions = {str(span["version"]) for span in meta.get("weight_versions", ())}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise EngineError(f"{where}: the answer is damaged: {error!r}") from error
    expected = {"prompt_tokens": len(ask.request.prompt_ids), "completion_tokens": len(tokens)}
    ids = answer.get("output_ids", list(tokens))
    if told != expected or ids != list(tokens):
        raise EngineError(
            f"{where}: the answer has {told} and the output_ids {str(ids)[:80]}, expected {expected} "
            f"and {str(list(tokens))[:80]}, the ids of its log-probabilities; the server cut the "
            "prompt, or its tokens do not belong to its log-probabilities"
        )
    if len(versions) > 1:
        raise EngineError(
            f"{where}: sampled by the weights {sorted(versions)}, one after the other; another "
            "trainer pushes to this server"
        )
    completion = Completion(
        token_ids=token_ids,
        rollout_logprobs=np.array(logprobs, dtype=np.float32),
        trace=_trace(
            meta,
            token_ids,
            num_retractions,
            policy,
            ask,
            facts=facts,
            layer_order=layer_order,
            where=where,
        ),
        finish_reason=_finish_reason(reason, token_ids, ask.sampling, where),
        policy_version=policy.policy_version,
    )
    return completion, policy


def _sampling_seed(seed: int, request_id: int, number: int) -> int:
    """Return a seed of 63 bits for a completion, for ``--enable-deterministic-inference``."""
    key = b"".join(part.to_bytes(8, "little") for part in (seed, request_id, number))
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def _finish_reason(
    reason: Any, token_ids: Int32[np.ndarray, " completion"], sampling: SamplingParams, where: str
) -> FinishReason:
    finish_reason = finish_reason_of(
        reason,
        len(token_ids),
        sampling,
        where=where,
        remedy="context or cache has no room for more: raise --context-length or "
        "--mem-fraction-static",
    )
    last = int(token_ids[-1])
    matched = reason.get("matched") if isinstance(reason, dict) else None
    if finish_reason is FinishReason.STOP and matched not in (last, [last]):
        raise EngineError(
            f"{where} ended on {matched!r}, expected a stop token that is its last token, "
            f"{last}; the server stops on a string, or sampled an unknown token"
        )
    return finish_reason


def _trace(
    meta: Mapping[str, Any],
    token_ids: Int32[np.ndarray, " completion"],
    num_retractions: int,
    policy: PolicyName,
    ask: Ask,
    *,
    facts: ModelFacts,
    layer_order: LayerOrder,
    where: str,
) -> RoutingTrace | None:
    if not ask.description.records_routes:
        return None
    model = facts.routed
    assert model is not None
    sequence = ask.request.sequence(token_ids)
    origin = ask.description.origin(policy_version=policy.policy_version, num_rows=len(sequence))
    if num_retractions:
        return unrouted_trace(sequence, model=model, origin=origin)
    return trace_from_payload(
        _decode_routes(meta.get("routed_experts"), model, len(sequence), where),
        token_ids=sequence,
        num_prompt_tokens=len(ask.request.prompt_ids),
        model=model,
        origin=origin,
        where=where,
        layer_order=layer_order,
    )


def _decode_routes(
    field: Any, model: RoutedModel, num_tokens: int, where: str
) -> Int32[np.ndarray, "rows layers topk"]:
    if not isinstance(field, str):
        raise EngineError(
            f"{where}: no routes came back, but {field!r}; the server was started without {FLAG}"
        )
    try:
        content = base64.b64decode(field, validate=True)
    except (binascii.Error, ValueError) as error:
        raise CodecError(f"{where}: routes are not valid base64: {error}") from error
    row_bytes = 4 * model.num_decoder_layers * model.topk
    if not content or len(content) % row_bytes:
        raise CodecError(
            f"{where}: routes hold {len(content)} bytes, expected {num_tokens - 1} rows of {row_bytes} "
            f"bytes ({model.num_decoder_layers} layers x {model.topk} experts of 4 bytes); the server "
            "serves another model, counts shared experts, or the answer was cut"
        )
    rows = np.frombuffer(content, dtype="<i4").astype(np.int32)
    return rows.reshape(-1, model.num_decoder_layers, model.topk)
