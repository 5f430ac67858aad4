"""HTTP calls to one server, each with a time limit, and what each kind of failure means.

In: a URL, bodies. Out: answers; `CallError` for anything a retry might fix.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any, TypeVar

import httpcore2

from moe_replay.engines.servers.certificates import trust_in, why_distrusted
from moe_replay.engines.servers.faults import CallError, Fault, GivenUpError
from moe_replay.engines.servers.http_lanes import Body, Lanes
from moe_replay.errors import EngineError, RecipeError
from moe_replay.recipe.bearer import without_secrets

_CONNECT_S = 5.0
_OK, _BAD_REQUEST, _UNAUTHORIZED, _NOT_FOUND, _STALE = 200, 400, 401, 404, 409
_UNPROCESSABLE = 422
# Characters of a server's text in a message.
_SHOWN = 2000


Answer = TypeVar("Answer")


class HttpCalls:
    """Calls to one server, by any number of threads, any of which may give all of them up.

    All calls run as tasks of one further thread: 128 completions at a time are 128 sockets and not
    128 threads. ``ca_file`` holds the certificates of trusted servers behind ``https://``, instead
    of those of the system.

    Raises:
        RecipeError: when ``ca_file`` cannot be read or holds no certificate.
    """

    content_type: str = "application/json"
    """Of every body."""

    def __init__(
        self,
        url: str,
        *,
        token: str | None,
        timeout_s: float,
        max_answer_bytes: int,
        ca_file: Path | None = None,
    ) -> None:
        self.url = without_secrets(url)
        """Address of the server as messages show it, credentials masked."""
        self._timeout_s, self._max_answer_bytes = timeout_s, max_answer_bytes
        self._ca_file = ca_file
        headers = {"content-type": self.content_type, "accept-encoding": "identity"}
        if token is not None:
            headers["authorization"] = f"Bearer {token}"
        self._lanes = Lanes(
            url, headers=headers, tls=None if ca_file is None else trust_in(ca_file)
        )
        self._loop = asyncio.new_event_loop()
        self._running: set[asyncio.Task[Any]] = set()
        self._given_up: set[asyncio.Task[Any]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="calls", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Give up running calls and close the connections. Calling it twice is allowed."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def give_up(self) -> None:
        """Make every running call raise `GivenUpError` and close its connection."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        # Once each, and never what is said to a server about a call that was given up.
        for task in self._running - self._given_up:
            task.cancel()
        self._given_up |= self._running

    async def _end(self) -> None:
        self._cancel()
        while self._running:
            await asyncio.gather(*self._running, return_exceptions=True)
        await self._lanes.aclose()

    def call(
        self,
        method: str,
        path: str,
        body: Body = b"",
        *,
        on_piece: Callable[[bytes], None] | None = None,
        silence_s: float | None = None,
    ) -> bytes:
        """Return the body of an answer; see `exchange`.

        Raises:
            RecipeError: when the server refuses the token.
            EngineError: when it refuses the call itself.
            CallError: for every other failure.
        """
        code, answer = self.exchange(method, path, body, on_piece=on_piece, silence_s=silence_s)
        return self._good(code, answer, path)

    def _good(self, code: int, answer: bytes, path: str) -> bytes:
        if code == _OK:
            return answer
        raise self.refusal(code, answer[: 4 * _SHOWN].decode(errors="replace"), path)

    def refusal(self, code: int, text: str, path: str) -> RecipeError | EngineError:
        """Return the error of a status code other than 200, which may also come inside a stream.

        Examples:
            >>> raise calls.refusal(409, "holds the weights of policy version 1", "/generate")
        """
        text = text[:_SHOWN]
        if code == _UNAUTHORIZED:
            return RecipeError(
                f"{self.url} refuses the bearer token; give the trainer the file with which the server "
                "was started"
            )
        if code in (_BAD_REQUEST, _UNPROCESSABLE):
            return EngineError(f"{self.url}{path} refuses the call: {text}")
        fault = Fault.STALE if code == _STALE else Fault.FAILED
        return CallError(fault, f"{self.url}{path} answers {code}: {text}")

    def call_json(
        self,
        method: str,
        path: str,
        message: Mapping[str, object] | None = None,
        *,
        silence_s: float | None = None,
    ) -> Any:
        """Return the JSON of an answer.

        Raises:
            CallError: as `call`, and when the answer is not JSON.
        """
        body = b"" if message is None else json.dumps(message, allow_nan=False).encode()
        return self.parsed(self.call(method, path, body, silence_s=silence_s), path)

    def parsed(self, answer: bytes, path: str) -> Any:
        """Return the JSON in the body of an answer.

        Raises:
            CallError: when it is not JSON.
        """
        try:
            return json.loads(answer)
        # Brackets nested too deeply for the interpreter raise RecursionError.
        except (ValueError, RecursionError) as error:
            raise CallError(Fault.CORRUPT, f"{self.url}{path}: not JSON: {error}") from error

    def has(self, path: str) -> bool:
        """Return whether the server has a path for GET."""
        return self.exchange("GET", path)[0] != _NOT_FOUND

    def exchange(
        self,
        method: str,
        path: str,
        body: Body = b"",
        *,
        on_piece: Callable[[bytes], None] | None = None,
        silence_s: float | None = None,
    ) -> tuple[int, bytes]:
        """Return status code and body of any answer.

        If the code is 200, ``on_piece`` gets each piece as it arrives, in another thread.

        An answer may take any time: ``silence_s`` (default: ``timeout_s``) limits the silence
        before its first piece and between two of them.

        Raises:
            CallError: when the server is silent for too long or its answer exceeds the limit.
            GivenUpError: when it was given up.
        """
        silence_s = self._timeout_s if silence_s is None else silence_s
        answer = self._answer(method, path, body, on_piece=on_piece, silence_s=silence_s)
        return self.result(self.begin(answer))

    def begin(self, answer: Coroutine[Any, Any, Answer]) -> Future[Answer]:
        """Start a call; `result` waits for it."""

        async def run() -> Answer:
            task = asyncio.current_task()
            assert task is not None
            self._running.add(task)
            try:
                return await answer
            finally:
                self._running.discard(task)
                self._given_up.discard(task)

        return asyncio.run_coroutine_threadsafe(run(), self._loop)

    def result(self, call: Future[Answer]) -> Answer:
        """Return the answer of a call that was started; if the wait is interrupted, give it up."""
        try:
            return call.result()
        except CancelledError as error:
            raise GivenUpError(f"{self.url}: the call was given up") from error
        except BaseException:
            # Also Ctrl-C, which ends the wait and not the call.
            call.cancel()
            raise

    async def _say_anyway(self, answer: Coroutine[Any, Any, Answer]) -> Answer:
        """Return the answer of a call that runs to its end even if its waiter is cancelled."""
        said = self._loop.create_task(answer)
        for tasks in (self._running, self._given_up):
            tasks.add(said)
            said.add_done_callback(tasks.discard)
        return await asyncio.shield(said)

    async def _answer(
        self,
        method: str,
        path: str,
        body: Body = b"",
        *,
        on_piece: Callable[[bytes], None] | None = None,
        silence_s: float | None,
    ) -> tuple[int, bytes]:
        try:
            async with self._lanes.stream(
                method, path, body, silence_s=silence_s, connect_s=_CONNECT_S
            ) as response:
                is_good = response.status == _OK
                answer = await self._read(response, on_piece if is_good else None)
                return response.status, answer
        except httpcore2.TimeoutException as error:
            raise CallError(
                Fault.SLOW, f"{self.url}{path}: no answer in time ({type(error).__name__})"
            ) from error
        except httpcore2.ConnectError as error:
            remedy = (
                why_distrusted(error, self._ca_file) or "start the server, or correct rollout.urls"
            )
            raise CallError(
                Fault.UNREACHABLE, f"{self.url}{path}: no connection ({error}); {remedy}"
            ) from error
        except (
            httpcore2.NetworkError,
            httpcore2.ProtocolError,
            httpcore2.UnsupportedProtocol,
        ) as error:
            raise CallError(
                Fault.UNREACHABLE, f"{self.url}{path}: {type(error).__name__}: {error}"
            ) from error

    async def _read(
        self, response: httpcore2.Response, on_piece: Callable[[bytes], None] | None
    ) -> bytes:
        answer = bytearray()
        async for piece in response.aiter_stream():
            if on_piece is not None:
                on_piece(piece)
            answer += piece
            if len(answer) > self._max_answer_bytes:
                raise CallError(
                    Fault.CORRUPT,
                    f"{self.url}: the answer exceeds {self._max_answer_bytes} bytes",
                )
        return bytes(answer)
