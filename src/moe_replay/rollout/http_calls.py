"""HTTP calls to one server, each with a time limit, and what each kind of failure means.

In: a URL, bodies. Out: answers; `CallError` for whatever another server, or a later call, may fix.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import StrEnum
from typing import Any

import httpx2

from moe_replay.errors import EngineError, RecipeError
from moe_replay.rollout.bearer import without_secrets

_CONNECT_S = 5.0
_OK, _BAD_REQUEST, _UNAUTHORIZED, _NOT_FOUND, _STALE = 200, 400, 401, 404, 409
_UNPROCESSABLE = 422
# Characters of a server's own words in a message.
_SHOWN = 2000


class Fault(StrEnum):
    """Why a call to a server failed."""

    UNREACHABLE = "unreachable"
    """No connection, or it broke: the server died, or never lived."""
    SLOW = "slow"
    """Nothing came within the limit on silence."""
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

    def __reduce__(self) -> tuple[type[CallError], tuple[Fault, str]]:
        """Let it pass from one process to another."""
        return type(self), (self.fault, str(self))


class HttpCalls:
    """Calls to one server. Threads may make them at the same time."""

    def __init__(
        self,
        url: str,
        *,
        token: str | None,
        timeout_s: float,
        max_answer_bytes: int,
        content_type: str = "application/json",
    ) -> None:
        self.url = without_secrets(url)
        """Address of the server as messages show it, credentials masked."""
        self._max_answer_bytes = max_answer_bytes
        headers = {"content-type": content_type, "accept-encoding": "identity"}
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

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def call(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        on_piece: Callable[[bytes], None] | None = None,
    ) -> bytes:
        """Return the body of an answer; ``on_piece`` gets each piece of a good one as it arrives.

        Raises:
            RecipeError: when the server refuses the token.
            EngineError: when it refuses the call itself.
            CallError: for every other failure.
        """
        code, answer = self.exchange(method, path, body, on_piece=on_piece)
        if code == _OK:
            return answer
        raise self.refusal(code, answer.decode(errors="replace"), path)

    def refusal(self, code: int, text: str, path: str) -> RecipeError | EngineError:
        """Return the error of an answer with a status code other than 200, which may also come inside of a stream.

        Example:
            >>> raise calls.refusal(409, "holds the weights of policy version 1", "/generate")
        """
        text = text[:_SHOWN]
        if code == _UNAUTHORIZED:
            return RecipeError(
                f"{self.url} refuses the bearer token; give the trainer the file with which the server was started"
            )
        if code in (_BAD_REQUEST, _UNPROCESSABLE):
            return EngineError(f"{self.url}{path} refuses the call: {text}")
        fault = Fault.STALE if code == _STALE else Fault.FAILED
        return CallError(fault, f"{self.url}{path} answers {code}: {text}")

    def call_json(self, method: str, path: str, message: Any = None) -> Any:
        """Return the JSON of an answer.

        Raises:
            CallError: as `call`, and when the answer is no JSON.
        """
        body = b"" if message is None else json.dumps(message, allow_nan=False).encode()
        answer = self.call(method, path, body)
        try:
            return json.loads(answer)
        # Brackets nested deeper than the interpreter goes are no ValueError.
        except (ValueError, RecursionError) as error:
            raise CallError(Fault.CORRUPT, f"{self.url}{path}: no JSON: {error}") from error

    def has(self, path: str) -> bool:
        """Tell whether the server knows a path that GET may ask for."""
        return self.exchange("GET", path)[0] != _NOT_FOUND

    def exchange(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        on_piece: Callable[[bytes], None] | None = None,
    ) -> tuple[int, bytes]:
        """Return status code and body of an answer, whatever they are; ``on_piece`` gets each piece of one of status 200.

        An answer may take any time: ``timeout_s`` limits the silence before its first piece and between two of them.

        Raises:
            CallError: when the server is silent for too long or its answer exceeds the limit.
        """
        try:
            with self._client.stream(method, path, content=body) as response:
                is_good = response.status_code == _OK
                return response.status_code, self._read(response, on_piece if is_good else None)
        except httpx2.TimeoutException as error:
            raise CallError(
                Fault.SLOW, f"{self.url}{path}: no answer in time ({type(error).__name__})"
            ) from error
        except httpx2.ConnectError as error:
            raise CallError(
                Fault.UNREACHABLE,
                f"{self.url}{path}: no connection ({error}); start the server, or correct rollout.urls",
            ) from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise CallError(
                Fault.UNREACHABLE, f"{self.url}{path}: {type(error).__name__}: {error}"
            ) from error

    def _read(
        self, response: httpx2.Response, on_piece: Callable[[bytes], None] | None = None
    ) -> bytes:
        answer = bytearray()
        for piece in response.iter_raw():
            if on_piece is not None:
                on_piece(piece)
            answer += piece
            if len(answer) > self._max_answer_bytes:
                raise CallError(
                    Fault.CORRUPT,
                    f"{self.url}: the answer exceeds {self._max_answer_bytes} bytes",
                )
        return bytes(answer)
