"""What vLLM engines share, whichever process runs them: their description, and completions made of vLLM's outputs.

In: facts of a checkpoint; what vLLM returns for one completion. Out: EngineDescription, Completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_replay.checkpoint.facts import ModelFacts
from moe_replay.engines.divergence import refuse_no_numbers
from moe_replay.engines.types import Completion, EngineDescription, FinishReason, Request
from moe_replay.engines.vllm.startup import vllm_version
from moe_replay.engines.vllm.wire import payload_of_output, trace_from_vllm
from moe_replay.errors import EngineError, RecipeError
from moe_replay.routing import LayerOrder, Origin, RoutedModel, RoutingTrace

_DTYPES = ("float32", "bfloat16")
_FINISH_REASONS = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "abort": FinishReason.ABORTED,
}


def describe(
    facts: ModelFacts,
    *,
    dtype: str,
    max_batch_size: int,
    max_context_length: int | None,
    record_routes: bool,
) -> EngineDescription:
    """Return the description of a vLLM engine; without ``max_context_length`` its context is that of the model.

    Raises:
        RecipeError: when an option is out of range, or vLLM is not installed.
        UnsupportedError: when another release of vLLM is installed than the one that this was tested on.
    """
    if dtype not in _DTYPES or max_batch_size < 1:
        raise RecipeError(
            f"the vLLM engine has dtype {dtype} and max_batch_size {max_batch_size}, expected one of {list(_DTYPES)}, "
            "and at least 1"
        )
    most = facts.max_context_length
    if max_context_length is not None and not 2 <= max_context_length <= most:
        raise RecipeError(
            f"max_context_length is {max_context_length}, expected 2 to {most}, the positions of the model"
        )
    routed = facts.routed
    return EngineDescription(
        name="vllm",
        version=vllm_version(),
        dtype=dtype,
        records_routes=record_routes and routed is not None,
        moe_layers=routed.moe_layers if routed else (),
        num_experts=routed.num_experts if routed else 0,
        topk=routed.topk if routed else 0,
        max_context_length=most if max_context_length is None else max_context_length,
    )


def completion_of(
    output: Any,
    *,
    token_ids: Sequence[int],
    rollout_logprobs: Sequence[float],
    request: Request,
    number: int,
    model: RoutedModel | None,
    version: str,
    policy_version: int,
    layer_order: LayerOrder | None = None,
) -> Completion:
    """Return completion ``number`` of ``request``.

    ``output`` is vLLM's last for it, which has the routes and why it ended; ``token_ids`` and ``rollout_logprobs`` are those of all
    its outputs. ``model`` is None where no routes are recorded, ``version`` is vLLM's, ``layer_order`` the engine's own.

    Raises:
        EngineError: when it ended in an unknown way, or routes are missing.
        DivergedError: when a token was drawn from logits that are not numbers.
        TraceError: when the routes are not those of the tokens.
    """
    (sampled,) = output.outputs
    where = f"vllm: request {request.request_id}, completion {number}"
    finish_reason = _FINISH_REASONS.get(sampled.finish_reason)
    if finish_reason is None:
        raise EngineError(
            f"{where} ended with finish_reason {sampled.finish_reason!r}, expected one of {list(_FINISH_REASONS)}"
        )
    tokens = np.array(token_ids, dtype=np.int32)
    logprobs = np.array(rollout_logprobs, dtype=np.float32)
    refuse_no_numbers(logprobs, where=where, policy_version=policy_version)
    trace: RoutingTrace | None = None
    if model is not None:
        every = np.concatenate([request.prompt_ids, tokens])
        trace = trace_from_vllm(
            payload_of_output(output, sampled),
            version=version,
            token_ids=every,
            num_prompt_tokens=len(request.prompt_ids),
            model=model,
            origin=Origin.single(
                engine="vllm",
                engine_version=version,
                policy_version=policy_version,
                num_rows=len(every),
            ),
            was_cut=finish_reason is FinishReason.ABORTED,
            where=where,
            layer_order=layer_order,
        )
    return Completion(
        token_ids=tokens,
        rollout_logprobs=logprobs,
        trace=trace,
        finish_reason=finish_reason,
        policy_version=policy_version,
    )
