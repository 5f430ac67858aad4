"""What the server engine needs from each of its servers, whichever protocol they speak."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from moe_replay.engines.serve.messages import PolicyName, Progress, Status, TransferStart
from moe_replay.engines.servers.faults import CallError, Fault
from moe_replay.engines.servers.push_files import WeightPart
from moe_replay.engines.types import (
    FINISH_REASONS,
    Completion,
    EngineDescription,
    FinishReason,
    Request,
    SamplingParams,
)
from moe_replay.errors import EngineError, UnsupportedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What one call asks of a server: completions of a request, by exactly some weights."""

    request: Request
    """The request."""
    numbers: Sequence[int]
    """Its completions that are wanted."""
    sampling: SamplingParams
    """How to sample them."""
    policy: PolicyName
    """The weights to sample by."""
    description: EngineDescription
    """What the answer is checked against."""
    crosses: bool = False
    """Whether a push may interrupt it, so that newer weights go on with it."""


@runtime_checkable
class RolloutServer(Protocol):
    """One server. Threads may call it at the same time."""

    url: str
    """Its address."""
    how_to_record: str
    """Why it may not record routes and what to do about it, for a message."""
    reads_files: bool
    """Whether it reads pushed weights from files."""
    returns_candidates: bool
    """Whether it can say what each token was drawn from."""

    def status(self) -> Status:
        """Return what the server is and which weights it holds.

        Raises:
            RecipeError: when it refuses the token, or is not a server of this kind.
            CallError: when it does not answer.
        """
        ...

    def check(self) -> None:
        """Test once, before anything is sampled, what `status` cannot tell.

        Raises:
            RecipeError: when the server does not answer as every engine must.
            CallError: when it does not answer.
        """
        ...

    def complete(
        self,
        ask: Ask,
        *,
        keep: Callable[[int, Completion], None],
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        """Sample what is asked for.

        Each completion is checked and passed to ``keep``, which ignores those that it has.
        ``on_progress`` may be called now and then, in any thread.

        Raises:
            EngineError: when the server refuses the request itself.
            CallError: when some could not be sampled; the others were kept.
        """
        ...

    def biases(self, error: CallError) -> bool:
        """Return whether sampling again what a failed call lost prefers some completions.

        It does when they are drawn by other noise and their content may have caused the failure.
        """
        ...

    def put_weights(self, part: WeightPart) -> None:
        """Give the server a part of a push, in order from part 0.

        Raises:
            CallError: when it does not accept it.
        """
        ...

    def commit_weights(self, policy: PolicyName) -> None:
        """Make the server load the parts that it was given, as ``policy``.

        Raises:
            EngineError: when the weights are not those of the server's model.
            CallError: when it does not answer.
        """
        ...

    def give_up(self) -> None:
        """Close the connections of all running calls, which then raise `GivenUpError`.

        The server notices and cancels them.
        """
        ...

    def close(self) -> None:
        """Close the connections."""
        ...


@runtime_checkable
class GroupServer(RolloutServer, Protocol):
    """A server that can join a process group with its trainer, and take parts of a push there."""

    takes_tensors: bool
    """Whether vLLM's own workers take a part there tensor by tensor; else the server its file."""

    def num_ranks(self) -> int:
        """Return how many ranks of the group it needs.

        Raises:
            CallError: when it does not answer.
        """
        ...

    def join_transfer(self, start: TransferStart) -> None:
        """Ask the server to join a process group; it does so after it has answered.

        Raises:
            EngineError: when it has no such transport.
            CallError: when it does not answer.
        """
        ...

    def announce(self, part: WeightPart, transfer: str) -> None:
        """Return once the server waits for a part in the group; part 0 begins the push.

        Raises:
            CallError: when it does not accept it.
        """
        ...

    def await_part(self, part: WeightPart) -> None:
        """Return once the announced part has arrived as it was sent.

        Raises:
            CallError: when it did not.
        """
        ...


CANDIDATES_REMEDY = (
    "sample from all ids (rollout.top_p = 1, top_k = 0, min_p = 0), or use `moe-replay serve`, or "
    'rollout.engine = "vllm" or "embedded"'
)
"""What to do where truncated sampling is refused."""

NEUTRAL = {
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "logit_bias": None,
}
"""What vLLM and SGLang call sampling options that change nothing. A server may take what is omitted
from generation_config.json or its own options."""


def refuse_candidates(sampling: SamplingParams, server: str) -> None:
    """Raise `UnsupportedError` when candidates are asked of a server that cannot return them."""
    if sampling.keeps_candidates:
        raise UnsupportedError(
            f"{server} does not return which ids truncation (top_p {sampling.top_p:g}, top_k "
            f"{sampling.top_k}, min_p {sampling.min_p:g}) left for each token, without which the "
            "trainer would compute the probabilities of another policy than sampled: "
            f"{CANDIDATES_REMEDY}"
        )


def finish_reason_of(
    told: object, num_tokens: int, sampling: SamplingParams, *, where: str, remedy: str
) -> FinishReason:
    """Return why a server of another project ended a completion, if that may be trained on.

    Raises:
        EngineError: when it was aborted, or holds nothing.
        CallError: when it was cut before its length; ``remedy`` says how not to.
    """
    # SGLang says more than vLLM, in a dictionary.
    reason = FINISH_REASONS.get(str(told.get("type") if isinstance(told, dict) else told))
    if reason not in (FinishReason.STOP, FinishReason.LENGTH) or num_tokens == 0:
        raise EngineError(
            f"{where} ended with {told!r} after {num_tokens} tokens, expected stop or length after "
            "at least one; the server aborted it"
        )
    if reason is FinishReason.LENGTH and num_tokens != sampling.max_completion_length:
        raise CallError(
            Fault.CUT,
            f"{where} ended at its length with {num_tokens} tokens, expected "
            f"{sampling.max_completion_length}; the server's {remedy}",
        )
    return reason


def check_policy(
    answered: PolicyName, wanted: PolicyName, url: str, *, newer: bool = False
) -> None:
    """Raise `CallError` unless a server answered by the weights asked for, or, ``newer``, later."""
    if not answered.may_answer(wanted, newer=newer):
        raise CallError(
            Fault.STALE,
            f"{url} answered by policy version {answered.policy_version} of {answered.run}, expected "
            f"{wanted.policy_version} of {wanted.run}",
        )
