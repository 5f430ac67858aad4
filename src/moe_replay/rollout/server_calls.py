"""Calls to one server of `moe-replay serve`: its own messages, routes by the codec, weights over HTTP.

In: a URL, requests, weights. Out: groups, statuses; `CallError` for whatever goes wrong. Called by: rollout.server_engine.
"""

from __future__ import annotations

from collections.abc import Sequence

from moe_replay.errors import CodecError, EngineError, RecipeError, TraceError
from moe_replay.rollout.http_calls import CallError, Fault, HttpCalls
from moe_replay.rollout.server_contract import WeightPart, check_policy
from moe_replay.rollout.server_messages import (
    CONTENT_TYPE,
    PROTOCOL,
    PolicyName,
    Status,
    call_bytes,
    read_groups,
    read_status,
)
from moe_replay.rollout.types import (
    EngineDescription,
    Request,
    RolloutGroup,
    SamplingParams,
    check_group,
)


class ServerCalls(HttpCalls):
    """One server. Threads may call it at the same time."""

    how_to_record: str = "it was started with --no-record-routes, or its model has no routers; start it without that flag"
    draws_by_seed: bool = True

    def __init__(
        self, url: str, *, token: str | None, timeout_s: float, max_answer_bytes: int
    ) -> None:
        super().__init__(
            url,
            token=token,
            timeout_s=timeout_s,
            max_answer_bytes=max_answer_bytes,
            content_type=CONTENT_TYPE,
        )

    def status(self) -> Status:
        """Return what the server is and which weights it holds.

        Raises:
            RecipeError: when it refuses the token, or is no moe-replay server of this version.
            CallError: when it does not answer.
        """
        body = self.call("GET", "/status", b"")
        try:
            status = read_status(body)
        except CodecError as error:
            raise RecipeError(
                f"{self.url} answers, but is no rollout server ({error}); start one with `moe-replay serve MODEL`"
            ) from error
        if status.protocol != PROTOCOL:
            raise RecipeError(
                f"{self.url} speaks version {status.protocol} of the protocol, expected {PROTOCOL}; install the same "
                "moe-replay on both sides"
            )
        return status

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingParams,
        *,
        policy: PolicyName,
        description: EngineDescription,
    ) -> list[RolloutGroup]:
        """Return completions that keep the contract of every engine, sampled by exactly the weights of ``policy``.

        Raises:
            EngineError: when the server refuses the requests themselves.
            CallError: for every other failure.
        """
        body = self.call("POST", "/generate", call_bytes(requests, sampling, policy))
        try:
            groups, answered = read_groups(body, requests, max_bytes=self._max_answer_bytes)
            for group in groups:
                check_group(group, description)
        except (TraceError, EngineError) as error:
            raise CallError(Fault.CORRUPT, f"{self.url}: {error}") from error
        check_policy(answered, policy, self.url)
        return groups

    def check(self) -> None:
        """Do nothing: these servers speak this engine's own protocol, and `status` says all there is."""

    def put_weights(self, part: WeightPart) -> None:
        """Give the server a part of a push.

        Raises:
            CallError: when it does not take it.
        """
        self.call("PUT", f"/weights/{part.number}", part.content)

    def commit_weights(self, policy: PolicyName) -> None:
        """Let the server load the parts that it was given, as ``policy``.

        Raises:
            EngineError: when the weights are not those of the server's model.
            CallError: when it does not answer.
        """
        self.call("POST", "/weights/commit", policy.model_dump_json().encode())
