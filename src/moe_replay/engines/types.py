"""The types that cross the engine seam: what is asked of an engine, and what every engine returns.

In: prompts. Out: Request, SamplingParams, Completion, RolloutGroup, EngineDescription and the Engine protocol.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32

from moe_replay.errors import DivergedError, EngineError
from moe_replay.routing import RoutingTrace
from moe_replay.routing.arrays import kept

if TYPE_CHECKING:
    import torch


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    """The end-of-sequence token, or a stop token, was sampled; it is part of the completion."""
    LENGTH = "length"
    """``max_completion_length`` tokens were sampled."""
    ABORTED = "aborted"
    """The request was cut off by the engine; the tokens so far, maybe none, are kept, counted, and never trained on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt, to be completed ``num_generations`` times."""

    request_id: int
    """Unique within a run; with the sampling seed it determines the noise of every completion."""
    prompt_ids: Int32[np.ndarray, " prompt"]
    """``[prompt]`` token ids as the engine must see them; nothing is added to them."""
    num_generations: int
    """Completions wanted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How completions are sampled.

    ``rollout_logprobs`` are those of ``softmax(logits / temperature)`` over the full vocabulary, whatever ``top_p``
    and ``top_k`` leave to draw from, because that is what a trainer recomputes (temperature 0: of ``softmax(logits)``).
    """

    max_completion_length: int
    """Most tokens to sample, the end-of-sequence token included."""
    temperature: float = 1.0
    """Softmax temperature; 0 takes the most likely token."""
    top_p: float = 1.0
    """Nucleus: smallest set of tokens whose probability reaches this; 1 keeps all."""
    top_k: int = 0
    """Most likely tokens kept; 0 keeps all."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a completion, besides the model's end-of-sequence tokens."""
    seed: int = 0
    """Seed of the run's sampling noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled continuation of a prompt of P tokens, T tokens long; T is 0 only where it was aborted before its first."""

    token_ids: Int32[np.ndarray, " completion"]
    """``[T]`` sampled ids, the stop token included."""
    rollout_logprobs: Float32[np.ndarray, " completion"]
    """``[T]``, log-probability of each sampled token under the sampling distribution of the engine, in nats."""
    trace: RoutingTrace | None
    """P + T rows bound to prompt + completion, the last one ``valid=False``; None when the engine records none."""
    finish_reason: FinishReason
    """Why sampling ended."""
    policy_version: int
    """Weight pushes that the engine had received when the completion ended."""
    server: str = ""
    """Address of the server that sampled it, credentials masked; empty for an engine in this process."""

    def __post_init__(self) -> None:
        for name in ("token_ids", "rollout_logprobs"):
            array = getattr(self, name)
            # An engine's buffer will hold its next answer soon. What is no array is refused in words, by `check_group`.
            if isinstance(array, np.ndarray):
                object.__setattr__(self, name, kept(array))


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """All completions of one request, in the order in which they were asked for."""

    request: Request
    """What was asked."""
    completions: tuple[Completion, ...]
    """``num_generations`` of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutProgress:
    """How far the running call of `Engine.generate` is."""

    num_finished: int = 0
    """Completions that have ended."""
    num_total: int = 0
    """Completions that were asked for; 0 while nothing runs."""
    num_tokens: int = 0
    """Tokens sampled so far, those of unfinished completions too where the engine knows them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineDescription:
    """What an engine is and what it can return; asked for before the first step."""

    name: str
    """Short name, such as ``embedded``."""
    version: str
    """Version of the library behind it."""
    dtype: str
    """Number format of its weights, such as ``bfloat16``."""
    records_routes: bool
    """Whether completions carry a trace."""
    moe_layers: tuple[int, ...]
    """Global decoder indices of the layers whose routes a trace holds; empty for a dense model."""
    num_experts: int
    """Routed experts a layer; 0 for a dense model."""
    topk: int
    """Experts per token; 0 for a dense model."""
    max_context_length: int
    """Most tokens, prompt and completion together."""


@runtime_checkable
class Engine(Protocol):
    """An inference engine that returns tokens, their log-probabilities and their routes."""

    @property
    def description(self) -> EngineDescription:
        """What this engine is and can return."""
        ...

    @property
    def policy_version(self) -> int:
        """Weight pushes received so far."""
        ...

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[RolloutGroup]:
        """Complete every request; the groups come back in the order of ``requests``.

        Raises:
            EngineError: when the engine fails, or a prompt leaves no room in the context.
        """
        ...

    def load_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], *, policy_version: int
    ) -> None:
        """Replace all weights by ``weights`` (Hugging Face checkpoint names) and adopt ``policy_version``.

        Raises:
            EngineError: when a name is unknown, missing, or of another shape.
        """
        ...

    def close(self) -> None:
        """Release memory, processes and ports. Calling it twice is allowed."""
        ...


@runtime_checkable
class CountsFaults(Protocol):
    """An engine whose calls may fail and be made up for, and which counts them."""

    @property
    def faults(self) -> Mapping[str, int]:
        """Kind of fault -> calls that failed in this way so far."""
        ...


@runtime_checkable
class ShowsProgress(Protocol):
    """An engine that can say how far it is while it samples."""

    @property
    def progress(self) -> RolloutProgress:
        """How far the running calls of `Engine.generate` are; all zeros while none runs. Other threads read it."""
        ...


def check_groups(
    groups: Sequence[RolloutGroup],
    requests: Sequence[Request],
    sampling: SamplingParams,
    description: EngineDescription,
    *,
    vocab_size: int,
    policy_version: int | None,
) -> None:
    """Raise `EngineError` unless ``groups`` answer ``requests`` as every engine must, whoever made it.

    ``vocab_size`` is that of the model that learns from them. ``policy_version`` is the one that they must have been
    sampled by; None takes any.
    """
    if len(groups) != len(requests):
        raise EngineError(
            f"{description.name} returned {len(groups)} groups for {len(requests)} requests, expected one for each, in "
            "their order"
        )
    for group, request in zip(groups, requests, strict=True):
        where = f"{description.name}: request {request.request_id}"
        _check_request(group.request, request, where)
        check_group(group, description)
        for number, completion in enumerate(group.completions):
            _check_asked(
                completion,
                sampling,
                where=f"{where}, completion {number}",
                vocab_size=vocab_size,
                policy_version=policy_version,
            )


def _check_request(answered: Request, asked: Request, where: str) -> None:
    same = (answered.request_id, answered.num_generations) == (
        asked.request_id,
        asked.num_generations,
    ) and np.array_equal(answered.prompt_ids, asked.prompt_ids)
    if not same:
        raise EngineError(
            f"{where}: the group in its place answers request {answered.request_id} ({answered.num_generations} "
            f"completions of a prompt of {len(answered.prompt_ids)} tokens), asked were {asked.num_generations} of one of "
            f"{len(asked.prompt_ids)}: return one group for each request, in their order, with the request itself in it"
        )


def _check_asked(
    completion: Completion,
    sampling: SamplingParams,
    *,
    where: str,
    vocab_size: int,
    policy_version: int | None,
) -> None:
    tokens = completion.token_ids
    foreign = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
    if len(foreign):
        wrong = int(foreign[0])
        raise EngineError(
            f"{where}: token {wrong} is {tokens[wrong]}, expected ids from 0 to {vocab_size - 1}, the vocabulary of the "
            "model that is trained; the engine runs another model, or reads ids in another number format"
        )
    if len(tokens) > sampling.max_completion_length:
        raise EngineError(
            f"{where}: {len(tokens)} tokens, asked for were {sampling.max_completion_length} at most "
            "(max_completion_length): the engine must stop there, and say FinishReason.LENGTH"
        )
    if policy_version is not None and completion.policy_version != policy_version:
        raise EngineError(
            f"{where} was sampled by policy version {completion.policy_version}, the trainer is at {policy_version} "
            "(weight pushes so far): its log-probabilities are those of other weights; return completions of the "
            "weights that were pushed last"
        )


def check_group(group: RolloutGroup, description: EngineDescription) -> None:
    """Raise `EngineError` unless a group keeps the contract of every engine (see `Engine`).

    What needs no more than the group: counts, number formats, log-probabilities, and traces bound to the very tokens
    of their completion, with T - 1 routed rows for T sampled tokens. `check_groups` also asks whether it is what was
    asked for.
    """
    request = group.request
    if len(group.completions) != request.num_generations:
        raise EngineError(
            f"{description.name}: request {request.request_id} got {len(group.completions)} completions, "
            f"asked for {request.num_generations}"
        )
    for number, completion in enumerate(group.completions):
        where = f"{description.name}: request {request.request_id}, completion {number}"
        tokens, logprobs = completion.token_ids, completion.rollout_logprobs
        _check_format(tokens, np.int32, f"{where}: token_ids")
        _check_format(logprobs, np.float32, f"{where}: rollout_logprobs")
        is_aborted = completion.finish_reason is FinishReason.ABORTED
        if len(tokens) != len(logprobs) or (len(tokens) == 0 and not is_aborted):
            raise EngineError(
                f"{where}: {len(tokens)} tokens and {len(logprobs)} rollout_logprobs, expected one each, and at least one "
                "unless FinishReason.ABORTED says that the request was cut off before its first token"
            )
        if np.isnan(logprobs).any():
            raise DivergedError(
                f"{where}: rollout_logprobs are NaN from sampled token {int(np.isnan(logprobs).argmax())} on, policy version "
                f"{completion.policy_version}: the weights have diverged (lower optimizer.lr), or the checkpoint holds NaN"
            )
        if not np.isfinite(logprobs).all() or (logprobs > 1e-3).any():
            raise EngineError(
                f"{where}: rollout_logprobs must be finite and at most 0, got {logprobs.min()} to {logprobs.max()}"
            )
        if not isinstance(completion.finish_reason, FinishReason):
            raise EngineError(
                f"{where}: finish_reason is {completion.finish_reason!r}, expected a FinishReason: one of "
                f"{', '.join(f'FinishReason.{reason.name}' for reason in FinishReason)}; it decides what is trained on"
            )
        if description.records_routes:
            _check_trace(completion, request, description, where)


def _check_format(array: Any, wanted: type, what: str) -> None:
    """Raise unless an array has the one number format in which completions travel between ranks."""
    wanted_name = np.dtype(wanted).name
    if isinstance(array, np.ndarray) and array.ndim == 1 and array.dtype == wanted:
        return
    got = (
        f"a {array.ndim}-dimensional array of {array.dtype}"
        if isinstance(array, np.ndarray)
        else f"a {type(array).__name__}"
    )
    raise EngineError(
        f"{what} are {got}, expected a 1-dimensional numpy array of {wanted_name}: nothing is cast on its way, so "
        f"return np.asarray(values, dtype=np.{wanted_name})"
    )


def _check_trace(
    completion: Completion, request: Request, description: EngineDescription, where: str
) -> None:
    trace = completion.trace
    if trace is None:
        raise EngineError(f"{where}: no trace, although the engine says that it records routes")
    expected: dict[str, Any] = {
        "layers": description.moe_layers,
        "experts": description.num_experts,
        "topk": description.topk,
    }
    got: dict[str, Any] = {"layers": trace.layers, "experts": trace.num_experts, "topk": trace.topk}
    if got != expected:
        raise EngineError(f"{where}: the trace has {got}, the engine's model has {expected}")
    trace.check_tokens(np.concatenate([request.prompt_ids, completion.token_ids]), where=where)
    if trace.valid[-1]:
        raise EngineError(
            f"{where}: the last row is valid, but the token sampled last is never fed to the model: "
            "the routes are shifted by one row"
        )
