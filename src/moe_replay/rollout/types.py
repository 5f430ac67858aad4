"""The types that cross the engine seam: what is asked of an engine, and what every engine returns.

In: prompts. Out: Request, SamplingParams, Completion, RolloutGroup, EngineDescription and the Engine protocol.
Called by: every engine, batch, grpo.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32

from moe_replay.errors import EngineError
from moe_replay.routing import RoutingTrace

if TYPE_CHECKING:
    import torch


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    """The end-of-sequence token, or a stop token, was sampled; it is part of the completion."""
    LENGTH = "length"
    """``max_completion_length`` tokens were sampled."""
    ABORTED = "aborted"
    """The request was cut off; the tokens so far are kept."""


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
    """One sampled continuation of a prompt of P tokens, T tokens long."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """All completions of one request, in the order in which they were asked for."""

    request: Request
    """What was asked."""
    completions: tuple[Completion, ...]
    """``num_generations`` of them."""


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


def check_group(group: RolloutGroup, description: EngineDescription) -> None:
    """Raise `EngineError` unless a group keeps the contract of every engine (see `Engine`).

    Called by the loop on whatever comes back, whoever made it: counts, log-probabilities, and traces bound to the
    very tokens of their completion, with T - 1 routed rows for T sampled tokens.
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
        if len(tokens) == 0 or len(tokens) != len(logprobs):
            raise EngineError(
                f"{where}: {len(tokens)} tokens and {len(logprobs)} rollout_logprobs, expected one each and at least one"
            )
        if not np.isfinite(logprobs).all() or (logprobs > 1e-3).any():
            raise EngineError(
                f"{where}: rollout_logprobs must be finite and at most 0, got {logprobs.min()} to {logprobs.max()}"
            )
        if description.records_routes:
            _check_trace(completion, request, description, where)


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
