"""Calls to one server of `moe-replay serve`, which receives weights over HTTP."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress

from pydantic import ValidationError

from moe_replay.engines.checks import check_group
from moe_replay.engines.serve.access import UNAVAILABLE
from moe_replay.engines.serve.frames import (
    CONTENT_TYPE,
    RESULT,
    ProgressWatch,
    last_frame,
    read_error,
)
from moe_replay.engines.serve.messages import (
    LOADING,
    MAX_CHUNK_BYTES,
    PROTOCOL,
    PartTransfer,
    PolicyName,
    Progress,
    PushCommit,
    PushPart,
    PushStart,
    Status,
    TransferStart,
    call_bytes,
    read_groups,
    read_message,
    sum_of_sums,
)
from moe_replay.engines.servers.contract import Ask, check_policy
from moe_replay.engines.servers.faults import CallError, Fault
from moe_replay.engines.servers.http import HttpCalls
from moe_replay.engines.servers.push_files import Chunk, WeightPart
from moe_replay.engines.types import Completion
from moe_replay.errors import CodecError, EngineError, RecipeError, TraceError

# Attempts to send a chunk of a push.
_MAX_SENDS = 3


class ServerCalls(HttpCalls):
    """One server. Threads may sample at the same time, while one of them pushes."""

    how_to_record: str = (
        "it was started with --no-record-routes, or its model has no routers; start it without that "
        "flag"
    )
    reads_files: bool = False
    returns_candidates: bool = True
    takes_tensors: bool = False
    content_type: str = CONTENT_TYPE

    _push: str = ""

    def status(self) -> Status:
        """Return what the server is and which weights it holds.

        Raises:
            RecipeError: when it refuses the token, or is not a moe-replay server of this version.
            CallError: when it does not answer.
        """
        body = self.call("GET", "/status", b"")
        try:
            status = read_message(Status, body)
        except CodecError as error:
            raise RecipeError(
                f"{self.url} answers, but is not a rollout server ({error}); start one with "
                "`moe-replay serve MODEL`"
            ) from error
        if status.protocol != PROTOCOL:
            raise RecipeError(
                f"{self.url} speaks version {status.protocol} of the protocol, expected {PROTOCOL}; "
                "install the same moe-replay on both sides"
            )
        return status

    def complete(
        self,
        ask: Ask,
        *,
        keep: Callable[[int, Completion], None],
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        """Sample all completions of a request, whichever of them are asked for.

        Those that are known come back as they were. ``on_progress`` is called about once a second,
        in any thread. Only silence ends a call that takes long.

        Raises:
            EngineError: when the server refuses the request itself.
            CallError: for every other failure.
        """
        asked = [ask.request]
        body = call_bytes(asked, ask.sampling, ask.policy, crosses=ask.crosses)
        result = self._result("/generate", body, on_progress)
        try:
            (group,), answered = read_groups(result, asked, max_bytes=self._max_answer_bytes)
            check_group(group, ask.description)
        except (TraceError, EngineError) as error:
            raise CallError(Fault.CORRUPT, f"{self.url}: {error}") from error
        check_policy(answered, ask.policy, self.url, newer=ask.crosses)
        for completion in group.completions:
            _check_versions(completion, ask, answered, self.url)
        for number, completion in enumerate(group.completions):
            keep(number, completion)

    def biases(self, error: CallError) -> bool:
        """Return False: what is sampled again comes out the same."""
        return False

    def check(self) -> None:
        """Do nothing: `status` of these servers tells everything."""

    def refusal(self, code: int, text: str, path: str) -> RecipeError | EngineError:
        """Return the error of a status code, which may also come inside a stream."""
        if code == UNAVAILABLE and text.startswith(LOADING):
            return CallError(Fault.LOADING, f"{self.url}{path} answers {code}: {text}")
        return super().refusal(code, text, path)

    def put_weights(self, part: WeightPart) -> None:
        """Give the server a part of a push in chunks; part 0 begins the push and ends any other.

        Raises:
            CallError: when it does not accept it.
        """
        if part.number == 0:
            self._begin_push()
        sums = []
        for chunk in part.chunks(MAX_CHUNK_BYTES):
            sums.append(chunk.crc32)
            query = f"offset={chunk.offset}&crc32={chunk.crc32}"
            self._send(f"/pushes/{self._push}/{part.number}?{query}", chunk)
        self._keep(part, sums)

    def num_ranks(self) -> int:
        """Return 1: the server takes parts for all its workers."""
        return 1

    def join_transfer(self, start: TransferStart) -> None:
        """Ask the server to join a process group; it does so after it has answered.

        Raises:
            EngineError: when it has no such transport.
            CallError: when it does not answer.
        """
        self.call("POST", "/transfers", start.model_dump_json().encode())

    def announce(self, part: WeightPart, transfer: str) -> None:
        """Return once the server waits for a part in the group; part 0 begins the push.

        Raises:
            CallError: when it does not accept it.
        """
        if part.number == 0:
            self._begin_push()
        message = PartTransfer(transfer=transfer, num_bytes=part.num_bytes, sums=_sums(part))
        path = f"/pushes/{self._push}/{part.number}/receive"
        self.call("POST", path, message.model_dump_json().encode())

    def await_part(self, part: WeightPart) -> None:
        """Return once the announced part has arrived as it was sent.

        Raises:
            CallError: when it did not.
        """
        self.call("POST", f"/pushes/{self._push}/{part.number}/received")
        self._keep(part, _sums(part))

    def _begin_push(self) -> None:
        self._push = uuid.uuid4().hex
        self._parts: list[PushPart] = []
        self.call("POST", "/pushes", PushStart(push=self._push).model_dump_json().encode())

    def _keep(self, part: WeightPart, sums: Sequence[int]) -> None:
        assert len(self._parts) == part.number
        self._parts.append(PushPart(num_bytes=part.num_bytes, sum=sum_of_sums(sums)))

    def commit_weights(self, policy: PolicyName) -> None:
        """Make the server load the parts that it was given, as ``policy``.

        Raises:
            EngineError: when the weights are not those of the server's model.
            CallError: when it does not answer, or goes back to the weights before.
        """
        commit = PushCommit(policy=policy, parts=self._parts).model_dump_json().encode()
        self._result(f"/pushes/{self._push}/commit", commit)

    def _send(self, path: str, chunk: Chunk) -> None:
        """Send a chunk, again if the connection broke: the server accepts the same chunk twice."""
        for attempt in range(_MAX_SENDS):
            try:
                self.call("PUT", path, chunk.pieces)
                return
            except CallError as error:
                is_last = attempt + 1 == _MAX_SENDS
                if is_last or error.fault not in (Fault.UNREACHABLE, Fault.FAILED):
                    raise

    def _result(
        self,
        path: str,
        body: bytes,
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> bytes:
        """Return the result of a call that is answered by frames."""

        def show(payload: bytes) -> None:
            # Damage is named once the answer is whole.
            with suppress(ValidationError):
                on_progress(Progress.model_validate_json(payload))

        answer = self.call("POST", path, body, on_piece=ProgressWatch(show).feed)
        try:
            kind, payload = last_frame(answer)
            if kind == RESULT:
                return payload
            status, text = read_error(payload)
        except CodecError as error:
            raise CallError(Fault.CORRUPT, f"{self.url}{path}: {error}") from error
        raise self.refusal(status, text, path)


def _sums(part: WeightPart) -> list[int]:
    return [chunk.crc32 for chunk in part.chunks(MAX_CHUNK_BYTES)]


def _check_versions(completion: Completion, ask: Ask, answered: PolicyName, url: str) -> None:
    """Raise `CallError` unless a completion's versions lie between what was asked for and held."""
    first, last = completion.oldest_version, completion.policy_version
    least = ask.policy.policy_version
    most = answered.policy_version if ask.crosses else least
    spans = () if completion.trace is None else completion.trace.origin.spans
    routed = {first, last} if not spans else {spans[0].policy_version, spans[-1].policy_version}
    if not least <= first <= last <= most or routed != {first, last}:
        raise CallError(
            Fault.CORRUPT,
            f"{url}: a completion was sampled by policy versions {first} to {last}, its routes by "
            f"{sorted(routed)}, expected {least} to {most} of both",
        )
