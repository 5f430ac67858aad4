"""What a rollout server and its clients send: checked JSON, safetensors arrays, encoded routes.

In: requests, groups, weights. Out: bytes; and back.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from moe_replay.engines.types import (
    Completion,
    EngineDescription,
    FinishReason,
    Request,
    RolloutGroup,
    SamplingParams,
    grouped,
)
from moe_replay.errors import CodecError
from moe_replay.routing import RoutingTrace, decode_traces, encode_traces
from moe_replay.routing.candidates import Candidates

PROTOCOL = 5
"""Version of these messages; a client refuses a server of another one."""
CHECKPOINT = "checkpoint"
"""Name in place of a run's while a server holds the weights that it started with."""

LOADING = "the model is being loaded; ask again later"
"""What a server says between the opening of its port and its first answer."""

# What both vLLM and SGLang say before anything was pushed.
_UNPUSHED = "default"
_MESSAGE, _TRACES = "message", "traces"
# Arrays of `Candidates`, of all completions that have some.
_CANDIDATES = ("counts", "ids", "kept_mass")


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


_Kind = TypeVar("_Kind", bound=_Message)


def read_message(kind: type[_Kind], body: bytes) -> _Kind:
    """Return the message in a body.

    Raises:
        CodecError: when the body holds something else.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise CodecError(f"the body is not a {kind.__name__}: {error}") from error


class PolicyName(_Message):
    """Which weights a server holds."""

    run: str = Field(max_length=64)
    """Name of the run that pushed them, or `CHECKPOINT`."""
    policy_version: int = Field(ge=0)
    """Weight pushes of that run."""

    @property
    def weight_version(self) -> str:
        """The name as one string, for servers of other projects, such as ``7f3a:2``."""
        return f"{self.run}:{self.policy_version}"

    def may_answer(self, wanted: PolicyName, *, newer: bool = False) -> bool:
        """Return whether these weights answer a call for ``wanted``, or, ``newer``, for older ones.

        A run that has pushed nothing yet asks for the checkpoint, under its own name.
        """
        if self.run == CHECKPOINT:
            return self == wanted or wanted.policy_version == 0
        is_newer = newer and self.policy_version > wanted.policy_version
        return self == wanted or (self.run == wanted.run and is_newer)

    @classmethod
    def read(cls, version: object) -> PolicyName:
        """Return the weights that a server's ``weight_version`` names.

        Examples:
            >>> PolicyName.read("7f3a:2")
            PolicyName(run='7f3a', policy_version=2)
        """
        text = str(version)
        if text == _UNPUSHED:
            return cls(run=CHECKPOINT, policy_version=0)
        run, _, number = text.rpartition(":")
        if run and number.isascii() and number.isdigit():
            return cls(run=run[:64], policy_version=int(number))
        return cls(run=text[:64], policy_version=0)


PushId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
"""Name of a push: 32 hexadecimal digits, drawn by its sender."""
MAX_PARTS = 100_000
"""Parts that a push may have at most, for the five digits of their files' names."""
MAX_CHUNK_BYTES = 64 << 20
"""Longest piece of a part in one call; a part may be of any length."""


def sum_of_sums(sums: Iterable[int]) -> int:
    """Return the CRC-32 of checksums: one number for the chunks of a part and their order."""
    return zlib.crc32(b"".join(value.to_bytes(4, "little") for value in sums))


class Status(_Message):
    """What a server is, and which weights it holds."""

    protocol: int
    """`PROTOCOL` of the server."""
    description: EngineDescription
    """What its engine is and can return."""
    policy: PolicyName
    """The weights that it holds."""
    crosses_pushes: bool = False
    """Whether what it samples can go on after a push."""


class Progress(_Message):
    """What a server is doing for a call, told at least once a second."""

    doing: Literal["waiting", "sampling", "checking", "loading"]
    """Waiting for a push or for running completions, sampling, checking a push, or loading it."""
    num_tokens: int = 0
    """Tokens sampled so far."""
    num_finished: int = 0
    """Completions that have ended."""


class PushStart(_Message):
    """Begins a push, and with it ends every other that was not committed."""

    push: PushId
    """Name of the push."""


class TransferStart(_Message):
    """Asks a server to join a process group with its trainer, through which parts will come."""

    transfer: PushId
    """Name of the group."""
    backend: Literal["gloo", "nccl"]
    """What carries the bytes."""
    address: str
    """Of the trainer, as servers reach it."""
    port: int = Field(ge=1, le=65535)
    """Where its ranks meet."""
    rank: int = Field(ge=1, lt=1 << 16)
    """Of this server; the trainer has 0."""
    size: int = Field(ge=2, le=1 << 16)
    """Ranks."""


class PartTransfer(_Message):
    """Announces a part that comes through the group."""

    transfer: PushId
    """Name of the group."""
    num_bytes: int = Field(ge=1, lt=1 << 48)
    """Length of the part."""
    sums: Annotated[list[Annotated[int, Field(ge=0, lt=1 << 32)]], Field(max_length=1 << 20)]
    """CRC-32 of each of its chunks of `MAX_CHUNK_BYTES`."""


class PushPart(_Message):
    """One file of a push as its sender knows it."""

    num_bytes: int = Field(ge=1)
    """Length of the file."""
    sum: int = Field(ge=0, lt=1 << 32)
    """`sum_of_sums` of the CRC-32 of its chunks, in their order."""


class PushCommit(_Message):
    """Asks to load the weights of a push, now that all its parts were sent."""

    policy: PolicyName
    """What the weights are called from then on."""
    parts: Annotated[list[PushPart], Field(min_length=1, max_length=MAX_PARTS)]
    """Every part, in the order of their numbers."""


# What fits in int32; whether it is a token is the engine's to say.
_TokenId = Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)]


class WireRequest(_Message):
    """One prompt of a `GenerateCall`."""

    request_id: int
    """As in `Request`."""
    prompt_ids: Annotated[list[_TokenId], Field(max_length=1 << 24)]
    """As in `Request`."""
    num_generations: int = Field(ge=1, le=1 << 16)
    """As in `Request`."""


class GenerateCall(_Message):
    """What a client asks a server to sample, and by which weights."""

    policy: PolicyName
    """Weights that the client believes the server to hold; it refuses when it holds others."""
    requests: Annotated[list[WireRequest], Field(max_length=1 << 16)]
    """Prompts."""
    sampling: SamplingParams
    """How to sample."""
    crosses: bool
    """Whether a push may interrupt the completions, which then go on under newer weights."""

    def engine_requests(self) -> list[Request]:
        """Return the prompts as an engine takes them."""
        return [
            Request(
                request_id=request.request_id,
                prompt_ids=np.array(request.prompt_ids, dtype=np.int32),
                num_generations=request.num_generations,
            )
            for request in self.requests
        ]


def call_bytes(
    requests: Sequence[Request],
    sampling: SamplingParams,
    policy: PolicyName,
    *,
    crosses: bool = False,
) -> bytes:
    """Return the body of a generate call."""
    call = GenerateCall(
        policy=policy,
        requests=[
            WireRequest(
                request_id=request.request_id,
                prompt_ids=request.prompt_ids.tolist(),
                num_generations=request.num_generations,
            )
            for request in requests
        ],
        sampling=sampling,
        crosses=crosses,
    )
    return call.model_dump_json().encode()


def groups_bytes(groups: Sequence[RolloutGroup], policy: PolicyName) -> bytes:
    """Return the result of a call: tokens and log-probabilities as arrays, traces as one payload.

    Of what the arrays hold, only tokens and traces vouch for each other, and a changed
    log-probability would be trained on: the frame that the result travels in has a checksum.
    """
    message = {
        "policy": policy.model_dump(),
        "groups": [
            {
                "request_id": group.request.request_id,
                "finish_reasons": [c.finish_reason.value for c in group.completions],
                "lengths": [len(c.token_ids) for c in group.completions],
                "versions": [[c.oldest_version, c.policy_version] for c in group.completions],
                "num_candidates": [
                    None if c.candidates is None else len(c.candidates.ids)
                    for c in group.completions
                ],
            }
            for group in groups
        ],
    }
    every = [completion for group in groups for completion in group.completions]
    traces = {str(n): c.trace for n, c in enumerate(every) if c.trace is not None}
    arrays = {
        _MESSAGE: np.frombuffer(json.dumps(message).encode(), dtype=np.uint8),
        "token_ids": np.concatenate([np.zeros(0, np.int32), *(c.token_ids for c in every)]),
        "rollout_logprobs": np.concatenate(
            [np.zeros(0, np.float32), *(c.rollout_logprobs for c in every)]
        ),
        _TRACES: np.frombuffer(encode_traces(traces), dtype=np.uint8),
    }
    limited = [c.candidates for c in every if c.candidates is not None]
    if limited:
        arrays |= {name: getattr(Candidates.concat(limited), name) for name in _CANDIDATES}
    return save_arrays(arrays)


def read_groups(
    body: bytes, requests: Sequence[Request], *, max_bytes: int
) -> tuple[list[RolloutGroup], PolicyName]:
    """Return the groups of a result for ``requests``, and the weights that the server held then.

    Raises:
        CodecError: when the body is damaged, or answers something else.
        TraceError: when a trace cannot be one.
    """
    try:
        arrays = load_arrays(body)
        message = json.loads(arrays[_MESSAGE].tobytes())
        policy = PolicyName.model_validate(message["policy"])
        traces = decode_traces(arrays[_TRACES].tobytes(), max_bytes=max_bytes)
        groups = _groups_of(message["groups"], arrays, traces, requests)
    except CodecError:
        raise
    except (SafetensorError, ValidationError, ValueError, KeyError, TypeError) as error:
        raise CodecError(f"the answer is damaged: {type(error).__name__}: {error}") from error
    return groups, policy


def _groups_of(
    told: list[Any],
    arrays: Mapping[str, np.ndarray],
    traces: Mapping[str, RoutingTrace],
    requests: Sequence[Request],
) -> list[RolloutGroup]:
    asked = [(r.request_id, r.num_generations) for r in requests]
    answered = [(group["request_id"], len(group["lengths"])) for group in told]
    if answered != asked:
        raise CodecError(
            f"the answer holds (request, completions) {answered[:8]}, expected {asked[:8]}; it answers "
            "another call"
        )
    lengths = [length for group in told for length in group["lengths"]]
    versions = [(int(a), int(b)) for group in told for a, b in group["versions"]]
    reasons = [FinishReason(reason) for group in told for reason in group["finish_reasons"]]
    tokens, rollout_logprobs = arrays["token_ids"], arrays["rollout_logprobs"]
    if min(lengths, default=0) < 0 or not sum(lengths) == len(tokens) == len(rollout_logprobs):
        raise CodecError(
            f"the answer holds {len(tokens)} tokens and {len(rollout_logprobs)} log-probabilities, "
            f"expected {sum(lengths)}, the sum of its lengths; it was cut"
        )
    if tokens.dtype != np.int32 or rollout_logprobs.dtype != np.float32:
        raise CodecError(
            f"tokens came as {tokens.dtype} and log-probabilities as {rollout_logprobs.dtype}, "
            "expected int32 and float32"
        )
    stops = np.cumsum(lengths)
    num_candidates = [count for group in told for count in group["num_candidates"]]
    candidates = _candidates_of(arrays, lengths, num_candidates)
    every = (
        Completion(
            token_ids=tokens[stop - length : stop],
            rollout_logprobs=rollout_logprobs[stop - length : stop],
            trace=traces.get(str(number)),
            finish_reason=reason,
            policy_version=last,
            began_under=None if first == last else first,
            candidates=candidates[number],
        )
        for number, (length, stop, reason, (first, last)) in enumerate(
            zip(lengths, stops, reasons, versions, strict=True)
        )
    )
    return grouped(requests, every)


def _candidates_of(
    arrays: Mapping[str, np.ndarray], lengths: Sequence[int], told: Sequence[int | None]
) -> list[Candidates | None]:
    """Return the candidates of each completion; ``told`` are their ids, None without any."""
    limited = [(n, count) for n, count in zip(lengths, told, strict=True) if count is not None]
    if not limited:
        return [None] * len(lengths)
    counts, ids, mass = (arrays[name] for name in _CANDIDATES)
    tokens, every = (np.cumsum([0, *sizes]) for sizes in zip(*limited, strict=True))
    if tokens[-1] != len(counts) or tokens[-1] != len(mass) or every[-1] != len(ids):
        raise CodecError(
            f"the answer holds {len(ids)} candidates of {len(counts)} tokens, expected {every[-1]} "
            f"of {tokens[-1]}; it was cut"
        )
    parts = iter(
        Candidates(
            counts=counts[tokens[n] : tokens[n + 1]],
            ids=ids[every[n] : every[n + 1]],
            kept_mass=mass[tokens[n] : tokens[n + 1]],
        )
        for n in range(len(limited))
    )
    return [None if count is None else next(parts) for count in told]
