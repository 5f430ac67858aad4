"""Calls to one rollout server, each with a time limit, and what each kind of failure means.

In: a URL, requests, weights. Out: groups, statuses; `CallError` for whatever goes wrong. Called by: rollout.server_engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import httpx2

from moe_replay.errors import CodecError, EngineError, RecipeError, TraceError
from moe_replay.rollout.server_messages import (
    CHECKPOINT,
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

_CONNECT_S = 5.0
_OK, _BAD_REQUEST, _UNAUTHORIZED, _STALE = 200, 400, 401, 409


class Fault(StrEnum):
    """Why a call to a server failed."""

    UNREACHABLE = "unreachable"
    """No connection, or it broke: the server died, or never lived."""
    SLOW = "slow"
    """No answer within the time limit."""
    FAILED = "failed"
    """The server says that its engine failed."""
    STALE = "stale"
    """The server holds other weights than it was given: it was restarted, or another trainer pushes to it."""
    CORRUPT = "corrupt"
    """The answer is damaged, or its routes do not belong to its tokens."""


class CallError(EngineError):
    """A call that may succeed on another server, or later."""

    def __init__(self, fault: Fault, message: str) -> None:
        super().__init__(message)
        self.fault = fault


class ServerCalls:
    """One server. Threads may call it at the same time."""

    def __init__(
        self, url: str, *, token: str | None, timeout_s: float, max_answer_bytes: int
    ) -> None:
        self.url = url
        self._max_answer_bytes = max_answer_bytes
        headers = {"content-type": CONTENT_TYPE}
        if token is not None:
            headers["authorization"] = f"Bearer {token}"
        self._client = httpx2.Client(
            base_url=url,
            headers=headers,
            timeout=httpx2.Timeout(timeout_s, connect=_CONNECT_S),
            limits=httpx2.Limits(max_connections=None),
            # A proxy of the environment is for the world outside, not for one's own servers.
            trust_env=False,
        )

    def status(self) -> Status:
        """Return what the server is and which weights it holds.

        Raises:
            RecipeError: when it refuses the token, or is no moe-replay server of this version.
            CallError: when it does not answer.
        """
        body = self._call("GET", "/status", b"")
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
        body = self._call("POST", "/generate", call_bytes(requests, sampling, policy))
        try:
            groups, answered = read_groups(body, requests, max_bytes=self._max_answer_bytes)
            for group in groups:
                check_group(group, description)
        except (TraceError, EngineError) as error:
            raise CallError(Fault.CORRUPT, f"{self.url}: {error}") from error
        at_start = answered.run == CHECKPOINT and policy.policy_version == 0
        if answered != policy and not at_start:
            raise CallError(
                Fault.STALE,
                f"{self.url} answered by policy version {answered.policy_version} of {answered.run}, expected "
                f"{policy.policy_version} of {policy.run}",
            )
        return groups

    def put_weights(self, number: int, part: bytes) -> None:
        """Give the server part ``number`` of a push.

        Raises:
            CallError: when it does not take it.
        """
        self._call("PUT", f"/weights/{number}", part)

    def commit_weights(self, policy: PolicyName) -> None:
        """Let the server load the parts that it was given, as ``policy``.

        Raises:
            EngineError: when the weights are not those of the server's model.
            CallError: when it does not answer.
        """
        self._call("POST", "/weights/commit", policy.model_dump_json().encode())

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _call(self, method: str, path: str, body: bytes) -> bytes:
        try:
            with self._client.stream(method, path, content=body) as response:
                answer = self._read(response)
        except httpx2.TimeoutException as error:
            raise CallError(
                Fault.SLOW, f"{self.url}{path}: no answer in time ({type(error).__name__})"
            ) from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise CallError(
                Fault.UNREACHABLE, f"{self.url}{path}: {type(error).__name__}: {error}"
            ) from error
        code = response.status_code
        if code == _OK:
            return answer
        text = answer[:2000].decode(errors="replace")
        if code == _UNAUTHORIZED:
            raise RecipeError(
                f"{self.url} refuses the bearer token; give the trainer the file with which the server was started"
            )
        if code == _BAD_REQUEST:
            raise EngineError(f"{self.url}{path} refuses the call: {text}")
        fault = Fault.STALE if code == _STALE else Fault.FAILED
        raise CallError(fault, f"{self.url}{path} answers {code}: {text}")

    def _read(self, response: httpx2.Response) -> bytes:
        answer = bytearray()
        for piece in response.iter_raw():
            answer += piece
            if len(answer) > self._max_answer_bytes:
                raise CallError(
                    Fault.CORRUPT,
                    f"{self.url}: the answer exceeds {self._max_answer_bytes} bytes",
                )
        return bytes(answer)
