"""The types of the engine seam: what is asked of an engine, and what every engine returns."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Int32, Integer

from moe_replay.routing import Origin, RoutingTrace
from moe_replay.routing.arrays import kept
from moe_replay.routing.candidates import Candidates

if TYPE_CHECKING:
    import torch


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    """The end-of-sequence token, or a stop token, was sampled; it is part of the completion."""
    LENGTH = "length"
    """``max_completion_length`` tokens were sampled."""
    ABORTED = "aborted"
    """The engine cut the request off; its tokens, if any, are counted and never trained on."""


FINISH_REASONS = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "abort": FinishReason.ABORTED,
}
"""How vLLM and SGLang spell a finish reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt, to be completed ``num_generations`` times."""

    request_id: int
    """Unique within a run; with the sampling seed it determines the noise of its completions."""
    prompt_ids: Int32[np.ndarray, " prompt"]
    """``[prompt]`` token ids as the engine must see them; nothing is added to them."""
    num_generations: int
    """Completions wanted."""
    max_completion_length: int | None = None
    """Limit of these completions where it is below that of the call: a later turn has only what is
    left of its conversation's."""

    def sampling(self, of_call: SamplingParams) -> SamplingParams:
        """Return how these completions are sampled in a call."""
        if self.max_completion_length is None:
            return of_call
        limit = min(self.max_completion_length, of_call.max_completion_length)
        return replace(of_call, max_completion_length=limit)

    def sequence(self, token_ids: Int32[np.ndarray, " completion"]) -> Int32[np.ndarray, " tokens"]:
        """Return prompt and completion as one array: the tokens that a trace covers."""
        return np.concatenate([self.prompt_ids, token_ids])


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How completions are sampled.

    ``rollout_logprobs`` are those of ``softmax(logits / temperature)`` over the full vocabulary
    (temperature 0: of ``softmax(logits)``), whatever truncation excludes; with ``keeps_candidates``
    over the candidates alone: those of the distribution that was drawn from. Truncation goes in the
    order top_k, top_p (of what top_k left), min_p.
    """

    max_completion_length: int
    """Maximum number of sampled tokens, the end-of-sequence token included."""
    temperature: float = 1.0
    """Softmax temperature; 0 takes the most likely token."""
    top_p: float = 1.0
    """Nucleus: smallest set of tokens whose probability reaches this; 1 keeps all."""
    top_k: int = 0
    """Only this many of the most likely tokens are kept; 0 keeps all."""
    min_p: float = 0.0
    """Only tokens at least this likely, in parts of the most likely one, are kept; 0 keeps all."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a completion, besides the model's end-of-sequence tokens."""
    seed: int = 0
    """Seed of the run's sampling noise."""
    keeps_candidates: bool = False
    """Whether completions say what each token was drawn from, and log-probabilities are those among
    these candidates; only with truncation."""

    @property
    def truncates(self) -> bool:
        """Whether tokens may be drawn from a part of the vocabulary."""
        limits = self.top_p < 1 or self.top_k > 0 or self.min_p > 0
        return limits and self.temperature > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled continuation, T tokens long, of a prompt of P tokens.

    T is 0 only when it was aborted before its first token. One of several turns holds the tokens of
    an environment too; no engine returns such a one.
    """

    token_ids: Int32[np.ndarray, " completion"]
    """``[T]`` ids, the stop token included."""
    rollout_logprobs: Float32[np.ndarray, " sampled"]
    """Log-probability in nats of each sampled token under the engine's sampling distribution."""
    trace: RoutingTrace | None
    """P + T rows bound to prompt + completion, the last ``valid=False``; None without routes."""
    finish_reason: FinishReason
    """Why sampling ended."""
    policy_version: int
    """Weight pushes that the engine had received when the completion ended."""
    server: str = ""
    """Address of the server that sampled it, credentials masked; empty without a server."""
    began_under: int | None = None
    """Policy version that sampled its first token, if a push came in between; its trace then says
    which rows are of which version. None: ``policy_version`` sampled all of it."""
    turn_mask: Bool[np.ndarray, " completion"] | None = None
    """``[T]``, False at tokens of an environment; None when all were sampled."""
    candidates: Candidates | None = None
    """What each sampled token was drawn from, with `SamplingParams.keeps_candidates`; else None."""

    def __post_init__(self) -> None:
        for name in ("token_ids", "rollout_logprobs", "turn_mask"):
            array = getattr(self, name)
            # A copy, as an engine may reuse its buffer. `check_group` refuses what is not an array.
            if isinstance(array, np.ndarray):
                object.__setattr__(self, name, kept(array))

    @property
    def sampled_ids(self) -> Int32[np.ndarray, " sampled"]:
        """The tokens that the policy sampled."""
        return self.token_ids if self.turn_mask is None else self.token_ids[self.turn_mask]

    @property
    def untruncated_logprobs(self) -> Float32[np.ndarray, " sampled"]:
        """``rollout_logprobs`` over the full vocabulary, also of tokens that have candidates.

        A token of 0.5 among candidates with 0.6 of the probability had 0.3 of it.
        """
        if self.candidates is None:
            return self.rollout_logprobs
        return self.rollout_logprobs + np.log(self.candidates.kept_mass)

    @property
    def oldest_version(self) -> int:
        """Policy version of its first token: by it a completion is stale."""
        return self.policy_version if self.began_under is None else self.began_under


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """All completions of one request, in the order asked for."""

    request: Request
    """What was asked."""
    completions: tuple[Completion, ...]
    """``num_generations`` of them."""


def grouped(requests: Iterable[Request], completions: Iterable[Completion]) -> list[RolloutGroup]:
    """Return one group a request, from the completions of all of them in the order asked for.

    Requests for 2 and 1 completions make of ``a b c`` the groups ``(a, b)`` and ``(c,)``.
    """
    left = iter(completions)
    groups = [
        RolloutGroup(
            request=request, completions=tuple(itertools.islice(left, request.num_generations))
        )
        for request in requests
    ]
    assert next(left, None) is None
    return groups


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutProgress:
    """How far the running call of `Engine.generate` is."""

    num_finished: int = 0
    """Completions that have ended."""
    num_total: int = 0
    """Completions asked for; 0 while nothing runs."""
    num_tokens: int = 0
    """Tokens sampled so far, including those of unfinished completions if the engine knows them."""


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
    """Global decoder indices of the layers in a trace; empty for a dense model."""
    num_experts: int
    """Routed experts a layer; 0 for a dense model."""
    topk: int
    """Experts per token; 0 for a dense model."""
    max_context_length: int
    """Maximum number of tokens, prompt and completion together."""

    def origin(self, *, policy_version: int, num_rows: int) -> Origin:
        """Return the origin of a trace of this engine, sampled by one policy version."""
        return Origin.single(
            engine=self.name,
            engine_version=self.version,
            policy_version=policy_version,
            num_rows=num_rows,
        )

    def trace(
        self,
        expert_ids: Integer[np.ndarray, "tokens layers topk"],
        token_ids: Int32[np.ndarray, " tokens"],
        *,
        policy_version: int,
    ) -> RoutingTrace:
        """Return the trace of prompt and completion; its last token was sampled but never run."""
        valid = np.ones(len(token_ids), dtype=bool)
        valid[-1] = False
        return RoutingTrace.record(
            expert_ids,
            token_ids=token_ids,
            valid=valid,
            layers=self.moe_layers,
            num_experts=self.num_experts,
            origin=self.origin(policy_version=policy_version, num_rows=len(token_ids)),
        )


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
        """Replace all weights by ``weights``, under the names of a Hugging Face checkpoint.

        The engine's policy version becomes ``policy_version``.

        Raises:
            EngineError: when a name is unknown, missing, or of another shape.
        """
        ...

    def close(self) -> None:
        """Release memory, processes and ports. Calling it twice is allowed."""
        ...


@runtime_checkable
class CountsFaults(Protocol):
    """An engine that retries failed calls and counts them."""

    @property
    def faults(self) -> Mapping[str, int]:
        """Kind of fault -> calls that have failed in this way."""
        ...


@runtime_checkable
class SamplesBeside(Protocol):
    """An engine on resources of its own, which samples while the trainer computes.

    With ``rollout.max_staleness`` `Engine.generate` is called in a thread of its own, one call at a
    time. No other method but `cancel` and properties is called while it runs.
    """

    def cancel(self) -> None:
        """End the running call of `Engine.generate`, which then raises; nothing where none runs.

        Another thread calls it.
        """
        ...


@runtime_checkable
class ShowsProgress(Protocol):
    """An engine that can say how far it is while it samples."""

    @property
    def progress(self) -> RolloutProgress:
        """How far the running calls of `Engine.generate` are; all zeros while none runs.

        Other threads read it.
        """
        ...


@runtime_checkable
class CountsPushedBytes(Protocol):
    """An engine that knows how many bytes a push takes on its way."""

    @property
    def pushed_bytes(self) -> int:
        """Bytes of the last push, as they went to each server."""
        ...
