"""What vLLM's HTTP server sends and accepts, as the types of every engine.

There are two ways to sample. A server started with this project's logits processor draws by the
noise of every engine here, and equal seeds give equal completions. Any other server draws by its
own noise, and reports log-probabilities that include the temperature but also top-p and top-k, so
these are refused there.

In: JSON of a server. Out: descriptions, completions.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from operator import getitem
from typing import Any

import numpy as np
from packaging.version import Version

from moe_replay.checkpoint.facts import ModelFacts
from moe_replay.engines.lifecycle import describe
from moe_replay.engines.servers.contract import (
    NEUTRAL,
    Ask,
    finish_reason_of,
    refuse_candidates,
)
from moe_replay.engines.types import Completion, EngineDescription
from moe_replay.engines.vllm.wire import (
    FLAG,
    check_version,
    make_completion,
    payload_of_json,
)
from moe_replay.errors import EngineError, RecipeError, UnsupportedError
from moe_replay.routing import LayerOrder

PROCESSOR = "moe_replay.engines.vllm.sampler:DrawTokens"
"""The logits processor that draws by the noise of every engine."""
_DRAW_FLAGS = (
    f"--logits-processors {PROCESSOR} --logprobs-mode processed_logits --no-async-scheduling"
)

# The first release that names the weights that it holds.
_OLDEST = Version("0.28")
# `KEY` of engines.vllm.sampler, which only an installed vLLM can import.
_DRAW = "moe_replay"
# How vLLM names a token beside its log-probability when it does not detokenize.
_TOKEN = "token_id:"
# Maximum size of the routes of one completion.
_ROUTE_BYTES = 1 << 30

NEEDED: Mapping[tuple[str, ...], tuple[int | None, str]] = {
    ("parallel_config", "pipeline_parallel_size"): (1, "vLLM captures no routes over pipelines"),
    ("model_config", "quantization"): (None, "pushed weights are of full precision"),
    ("speculative_config",): (None, "tokens are drafted by another model, whose routers run too"),
    ("kv_transfer_config",): (None, "rows that come from another server have no routes"),
}
"""Entry of a server's configuration -> the value that replay needs, and what any other one does."""


def read_server(
    version: Any, told: Any, facts: ModelFacts, url: str
) -> tuple[EngineDescription, bool]:
    """Return what a server is, and whether it draws by this project's logits processor.

    ``version`` and ``told`` are its ``/version`` and ``/server_info?config_format=json``.

    Raises:
        RecipeError: when it reports other log-probabilities than the trainer recomputes.
        UnsupportedError: when its release or an option prevents routes that belong to the tokens.
    """
    release = version.get("version") if isinstance(version, dict) else version
    if check_version(str(release)) < _OLDEST:
        raise UnsupportedError(
            f"{url} runs vLLM {release}, which does not name the weights that it holds; the first "
            f"release that does is {_OLDEST}"
        )
    try:
        config = told["vllm_config"]
        model = config["model_config"]
        mode, processors = model["logprobs_mode"], model["logits_processors"] or []
        is_recording = model["enable_return_routed_experts"]
        is_async = config["scheduler_config"]["async_scheduling"]
        dtype, length = str(model["dtype"]).removeprefix("torch."), int(model["max_model_len"])
        is_cpu = config["device_config"]["device"] == "cpu"
        got = {entry: reduce(getitem, entry, config) for entry in NEEDED}
    except (KeyError, TypeError, ValueError) as error:
        raise UnsupportedError(
            f"{url}/server_info has another form than that of vLLM 0.30 ({error!r}); use "
            "`moe-replay serve` there"
        ) from error
    for entry, (expected, reason) in NEEDED.items():
        if got[entry] != expected:
            raise UnsupportedError(
                f"{url} runs with {entry[-1]} = {got[entry]!r}, expected {expected!r}: {reason}; "
                "start it without"
            )
    draws = PROCESSOR in processors
    _check_sampling_of(url, mode, draws=draws, is_async=is_async is True, is_cpu=is_cpu)
    description = describe(
        facts,
        name="vllm",
        version=str(release),
        dtype=dtype,
        record_routes=is_recording is True,
        max_context_length=min(facts.max_context_length, length),
    )
    return description, draws


def generate_message(ask: Ask, number: int, *, facts: ModelFacts, draws: bool) -> dict[str, Any]:
    """Return the body of an ``/inference/v1/generate`` call for completion ``number``.

    Raises:
        RecipeError: when the server's log-probabilities would be those of a truncated distribution.
        UnsupportedError: when candidates are asked for.
    """
    request, sampling = ask.request, ask.sampling
    refuse_candidates(sampling, "a plain vLLM server")
    if not draws and sampling.truncates:
        raise RecipeError(
            f"top_p is {sampling.top_p}, top_k {sampling.top_k} and min_p {sampling.min_p}, but a "
            "plain vLLM server reports log-probabilities of the truncated distribution and not what "
            "it is: set top_p = 1, top_k = 0 and min_p = 0, or start the server with "
            f"{_DRAW_FLAGS}"
        )
    params: dict[str, Any] = {
        "n": 1,
        "max_tokens": sampling.max_completion_length,
        # The best token of a row is the drawn one where this project draws.
        "temperature": 0.0 if draws else sampling.temperature,
        "top_p": 1.0,
        "top_k": 0,
        **NEUTRAL,
        "min_tokens": 0,
        "logprobs": 0,
        "stop_token_ids": sorted({*facts.eos_ids, *sampling.stop_token_ids}),
        "ignore_eos": True,
        "detokenize": False,
    }
    if draws:
        draw = {
            "seed": sampling.seed,
            "request_id": request.request_id,
            "completion": number,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "num_known_ids": facts.num_known_ids,
            "num_before": 0,
            "ticket": None,
        }
        params["extra_args"] = {_DRAW: draw}
    # Not streamed: before a slow reader vLLM 0.30 merges pieces and loses the routes, which come
    # with the last one (`RequestOutput.add`).
    return {"token_ids": request.prompt_ids.tolist(), "sampling_params": params, "stream": False}


def read_completion(
    answer: Any, ask: Ask, *, facts: ModelFacts, layer_order: LayerOrder, where: str
) -> Completion:
    """Return the completion of an answer; ``layer_order`` belongs to its server.

    Raises:
        EngineError: when the answer is damaged, cut, or ended in an unknown way.
        TraceError: when its routes are not those of its tokens.
        DivergedError: when a token was drawn from logits that are not finite.
    """
    try:
        (choice,) = answer["choices"]
        token_ids = np.array(choice["token_ids"], dtype=np.int32)
        content = choice["logprobs"]["content"]
        named = [str(entry["token"]) for entry in content]
        rollout_logprobs = np.array([float(entry["logprob"]) for entry in content], np.float32)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise EngineError(f"{where}: the answer is damaged: {error!r}") from error
    finish_reason = finish_reason_of(
        choice.get("finish_reason"),
        # That each has a token is checked next.
        len(named) if token_ids.ndim == 1 and token_ids.size else 0,
        ask.sampling,
        where=where,
        remedy="context has no room for more: raise --max-model-len",
    )
    if named != [f"{_TOKEN}{token}" for token in token_ids.tolist()]:
        raise EngineError(
            f"{where}: the log-probabilities are those of {str(named)[:80]}, the tokens are "
            f"{str(token_ids.tolist())[:80]}: they do not belong together"
        )
    return make_completion(
        token_ids,
        rollout_logprobs,
        payload_of_json(answer, choice, max_bytes=_ROUTE_BYTES),
        finish_reason=finish_reason,
        request=ask.request,
        facts=facts,
        description=ask.description,
        policy_version=ask.policy.policy_version,
        layer_order=layer_order,
        where=where,
    )


def _check_sampling_of(url: str, mode: Any, *, draws: bool, is_async: bool, is_cpu: bool) -> None:
    expected = "processed_logits" if draws else "processed_logprobs"
    if mode != expected:
        raise RecipeError(
            f"{url} reports {mode}, expected {expected}: other log-probabilities are not those of the "
            f"sampling temperature; start it with --logprobs-mode {expected}"
        )
    if draws and is_async:
        raise RecipeError(
            f"{url} schedules asynchronously, and noise is indexed by a number of tokens that such a "
            "schedule does not know yet; start it with --no-async-scheduling"
        )
    if is_cpu and not draws:
        raise UnsupportedError(
            f"{url} runs vLLM's CPU build, which silently corrupts expert weights when they are "
            "updated unless moe-replay is installed next to it; install it there and start the "
            f"server with {_DRAW_FLAGS} ({FLAG} for routes)"
        )
