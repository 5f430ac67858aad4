"""What every engine checks of a call, and the trainer of an answer, at the border between them.

In: requests and sampling settings; groups. Out: nothing, or an error.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_replay.engines.types import (
    Completion,
    EngineDescription,
    FinishReason,
    Request,
    RolloutGroup,
    SamplingParams,
)
from moe_replay.errors import DivergedError, EngineError, RecipeError

# One past the largest number that fits in a word of the noise generator.
_WORD = 1 << 64


def check_sampling(sampling: SamplingParams) -> None:
    """Raise `RecipeError` when a setting lies outside its range."""
    ranges = (
        ("max_completion_length", sampling.max_completion_length >= 1, "at least 1"),
        ("temperature", 0.0 <= sampling.temperature < float("inf"), "0 (take the best) or more"),
        ("top_p", 0.0 < sampling.top_p <= 1.0, "above 0 and at most 1 (keep all)"),
        ("top_k", sampling.top_k >= 0, "0 (keep all) or more"),
        ("min_p", 0.0 <= sampling.min_p <= 1.0, "0 (keep all) to 1"),
        (
            "keeps_candidates",
            sampling.truncates or not sampling.keeps_candidates,
            "False without truncation (top_p, top_k or min_p, at a temperature above 0)",
        ),
        ("seed", 0 <= sampling.seed < _WORD, "0 to 2**64 - 1"),
    )
    for name, holds, expected in ranges:
        if not holds:
            raise RecipeError(f"sampling.{name} is {getattr(sampling, name)}, expected {expected}")


def check_requests(
    requests: Sequence[Request],
    sampling: SamplingParams,
    *,
    description: EngineDescription,
    vocab_size: int,
) -> None:
    """Raise `EngineError` for a malformed, repeated or too long request."""
    seen: set[int] = set()
    for request in requests:
        where = f"{description.name}: request {request.request_id}"
        prompt, room = request.prompt_ids, description.max_context_length
        if not 0 <= request.request_id < _WORD or request.request_id in seen:
            raise EngineError(
                f"{where}: expected ids from 0 to 2**64 - 1, each once in a call; requests with the "
                "same id would sample with the same noise"
            )
        seen.add(request.request_id)
        if len(prompt) == 0 or request.num_generations < 1:
            raise EngineError(
                f"{where} has {len(prompt)} prompt tokens and asks for {request.num_generations} "
                "completions, expected at least one of each"
            )
        if prompt.min() < 0 or prompt.max() >= vocab_size:
            raise EngineError(
                f"{where} has token ids {prompt.min()} to {prompt.max()}, expected 0 to "
                f"{vocab_size - 1}; the tokenizer belongs to another model"
            )
        limit = request.sampling(sampling).max_completion_length
        if limit < 1:
            raise EngineError(f"{where} has max_completion_length {limit}, expected at least 1")
        if len(prompt) + limit > room:
            raise EngineError(
                f"{where}: a prompt of {len(prompt)} tokens and max_completion_length "
                f"{limit} exceed the context of {room} tokens; shorten one "
                "of them"
            )


def check_groups(
    groups: Sequence[RolloutGroup],
    requests: Sequence[Request],
    sampling: SamplingParams,
    description: EngineDescription,
    *,
    vocab_size: int,
    policy_versions: range | None,
) -> None:
    """Raise `EngineError` unless ``groups`` answer ``requests`` as every engine must.

    ``vocab_size`` is that of the model that is trained. ``policy_versions`` may have sampled them,
    the last one is the trainer's; None accepts any.
    """
    if len(groups) != len(requests):
        raise EngineError(
            f"{description.name} returned {len(groups)} groups for {len(requests)} requests, "
            "expected one for each, in their order"
        )
    for group, request in zip(groups, requests, strict=True):
        where = f"{description.name}: request {request.request_id}"
        _check_request(group.request, request, where)
        check_group(group, description)
        for number, completion in enumerate(group.completions):
            _check_asked(
                completion,
                request.sampling(sampling),
                where=f"{where}, completion {number}",
                vocab_size=vocab_size,
                policy_versions=policy_versions,
            )


def _check_request(answered: Request, asked: Request, where: str) -> None:
    same = (answered.request_id, answered.num_generations) == (
        asked.request_id,
        asked.num_generations,
    ) and np.array_equal(answered.prompt_ids, asked.prompt_ids)
    if not same:
        raise EngineError(
            f"{where}: the group at its position answers request {answered.request_id} "
            f"({answered.num_generations} completions of a prompt of {len(answered.prompt_ids)} "
            f"tokens), expected {asked.num_generations} of one of {len(asked.prompt_ids)}: return "
            "one group for each request, in their order, with the request itself in it"
        )


def _check_asked(
    completion: Completion,
    sampling: SamplingParams,
    *,
    where: str,
    vocab_size: int,
    policy_versions: range | None,
) -> None:
    tokens = completion.token_ids
    foreign = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
    if len(foreign):
        wrong = int(foreign[0])
        raise EngineError(
            f"{where}: token {wrong} is {tokens[wrong]}, expected ids from 0 to {vocab_size - 1}, "
            "the vocabulary of the model that is trained; the engine runs another model, or reads "
            "ids in another number format"
        )
    _check_candidates(completion, sampling, where=where, vocab_size=vocab_size)
    if len(tokens) > sampling.max_completion_length:
        raise EngineError(
            f"{where}: {len(tokens)} tokens, expected at most {sampling.max_completion_length} "
            "(max_completion_length): the engine must stop there and return FinishReason.LENGTH"
        )
    versions = (completion.oldest_version, completion.policy_version)
    if policy_versions is not None and any(v not in policy_versions for v in versions):
        allowed = (
            f"; rollout.max_staleness accepts {policy_versions[0]} to {policy_versions[-1]}"
            if len(policy_versions) > 1
            else ""
        )
        raise EngineError(
            f"{where} was sampled by policy version "
            f"{' to '.join(map(str, sorted({*versions})))}, the trainer is at "
            f"{policy_versions[-1]} (weight pushes so far): its log-probabilities are those of other "
            f"weights; return completions of the weights that were pushed last{allowed}"
        )


def _check_candidates(
    completion: Completion, sampling: SamplingParams, *, where: str, vocab_size: int
) -> None:
    candidates = completion.candidates
    if (candidates is not None) != sampling.keeps_candidates:
        got, expected = ("no candidates", "those") if candidates is None else ("candidates", "none")
        raise EngineError(
            f"{where}: {got}, expected {expected} of {sampling}: log-probabilities and candidates "
            "must be those of the sampling that was asked for, or the trainer compares two "
            "distributions; set Completion.candidates exactly when sampling.keeps_candidates is True"
        )
    if candidates is not None:
        candidates.check(completion.sampled_ids, vocab_size=vocab_size, where=where)


def check_group(group: RolloutGroup, description: EngineDescription) -> None:
    """Raise `EngineError` unless a group keeps the contract of every engine (see `Engine`).

    It checks the group alone: counts, number formats, log-probabilities, and traces bound to the
    tokens of their completion, with T - 1 routed rows for T sampled tokens. `check_groups` also
    checks that it is what was asked for.
    """
    request = group.request
    if len(group.completions) != request.num_generations:
        raise EngineError(
            f"{description.name}: request {request.request_id} got {len(group.completions)} "
            f"completions, asked for {request.num_generations}"
        )
    for number, completion in enumerate(group.completions):
        where = f"{description.name}: request {request.request_id}, completion {number}"
        tokens, logprobs = completion.token_ids, completion.rollout_logprobs
        _check_format(tokens, np.int32, f"{where}: token_ids")
        _check_format(logprobs, np.float32, f"{where}: rollout_logprobs")
        if completion.turn_mask is not None:
            raise EngineError(
                f"{where} has a turn_mask, which marks tokens of an environment: an engine returns the "
                "tokens of one turn, all sampled"
            )
        is_aborted = completion.finish_reason is FinishReason.ABORTED
        if len(tokens) != len(logprobs) or (len(tokens) == 0 and not is_aborted):
            raise EngineError(
                f"{where}: {len(tokens)} tokens and {len(logprobs)} rollout_logprobs, expected one "
                "each, and at least one unless the request was cut off before its first token "
                "(FinishReason.ABORTED)"
            )
        if np.isnan(logprobs).any():
            raise DivergedError(
                f"{where}: rollout_logprobs are NaN from sampled token "
                f"{int(np.isnan(logprobs).argmax())} on, policy version "
                f"{completion.policy_version}: the weights have diverged (lower optimizer.lr), or "
                "the checkpoint holds NaN"
            )
        if not np.isfinite(logprobs).all() or (logprobs > 1e-3).any():
            raise EngineError(
                f"{where}: rollout_logprobs must be finite and at most 0, got {logprobs.min()} to "
                f"{logprobs.max()}"
            )
        if not isinstance(completion.finish_reason, FinishReason):
            raise EngineError(
                f"{where}: finish_reason is {completion.finish_reason!r}, expected a FinishReason: one "
                f"of {', '.join(f'FinishReason.{reason.name}' for reason in FinishReason)}; it "
                "decides what is trained on"
            )
        if description.records_routes:
            _check_trace(completion, request, description, where)


def _check_format(array: object, wanted: type, what: str) -> None:
    """Raise unless an array has the number format in which completions travel between ranks."""
    wanted_name = np.dtype(wanted).name
    if isinstance(array, np.ndarray) and array.ndim == 1 and array.dtype == wanted:
        return
    got = (
        f"a {array.ndim}-dimensional array of {array.dtype}"
        if isinstance(array, np.ndarray)
        else f"a {type(array).__name__}"
    )
    raise EngineError(
        f"{what} are {got}, expected a 1-dimensional numpy array of {wanted_name}: nothing is cast "
        f"later, so return np.asarray(values, dtype=np.{wanted_name})"
    )


def _check_trace(
    completion: Completion, request: Request, description: EngineDescription, where: str
) -> None:
    trace = completion.trace
    if trace is None:
        raise EngineError(f"{where}: no trace, although the engine says that it records routes")
    expected = (description.moe_layers, description.num_experts, description.topk)
    got = (trace.layers, trace.num_experts, trace.topk)
    if got != expected:
        raise EngineError(
            f"{where}: the trace has (layers, experts, top-k) {got}, the engine's model has {expected}"
        )
    trace.check_tokens(request.sequence(completion.token_ids), where=where)
    if trace.valid[-1]:
        raise EngineError(
            f"{where}: the last row is valid, but the last sampled token is never run: the routes are "
            "shifted by one row"
        )
