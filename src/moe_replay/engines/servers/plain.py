"""What calls to a server that knows nothing of moe-replay share: answers that may take any time, pushes as files, a trial.

Such a server draws by noise of its own unless it was started otherwise. Then a completion that is asked for again is another
one, and a limit on its time would leave the short ones: so nothing limits it but the silence of the whole server.

In: a URL, the model's facts. Out: a base of the calls to such a server.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

import numpy as np

from moe_replay.checkpoint.facts import ModelFacts
from moe_replay.engines.serve.messages import PolicyName, Progress
from moe_replay.engines.servers.contract import WeightPart, generate_by_one
from moe_replay.engines.servers.http import CallError, Fault, HttpCalls
from moe_replay.engines.types import (
    Completion,
    EngineDescription,
    Request,
    RolloutGroup,
    SamplingParams,
)
from moe_replay.errors import EngineError, RecipeError
from moe_replay.routing import LayerOrder

# Longest time between two looks at a server that sends nothing.
_PROBE_S = 15.0
# Longest wait for a server to say that it is up.
_UP_S = 10.0
# A load of this many bytes may take a second more: from a network's disk, on a busy machine.
_LOAD_BYTES_PER_S = 50 << 20


class PlainCalls(HttpCalls, ABC):
    """One server of another project. Threads may call it at the same time."""

    def __init__(
        self,
        url: str,
        *,
        token: str | None,
        timeout_s: float,
        max_answer_bytes: int,
        facts: ModelFacts,
        ca_file: Path | None = None,
    ) -> None:
        super().__init__(
            url,
            token=token,
            timeout_s=timeout_s,
            max_answer_bytes=max_answer_bytes,
            ca_file=ca_file,
        )
        self._facts = facts
        # One a server: what its short payloads show of the order of its layers adds up.
        self._layer_order = LayerOrder()
        self._pushed: Path | None = None
        self._pushed_bytes = 0
        self._waiting: set[asyncio.Timeout] = set()
        self._watch: asyncio.Task[None] | None = None
        self._last_piece_s = 0.0
        self._num_silences = 0

    @abstractmethod
    async def _shows_life(self) -> bool:
        """Tell whether the server has worked since it was asked last, on whatever."""

    @abstractmethod
    def complete(
        self,
        request: Request,
        numbers: Sequence[int],
        sampling: SamplingParams,
        *,
        policy: PolicyName,
        description: EngineDescription,
        keep: Callable[[int, Completion], None],
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        """Sample the completions ``numbers`` of a request, as `PlainServer` says."""

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingParams,
        *,
        policy: PolicyName,
        description: EngineDescription,
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> list[RolloutGroup]:
        """Return the completions of all requests, as `complete` samples them."""
        return generate_by_one(self, requests, sampling, policy=policy, description=description)

    def is_up(self) -> bool:
        """Tell whether the server and its engine live, after a call has failed."""
        try:
            return self.exchange("GET", "/health", silence_s=min(_UP_S, self._timeout_s))[0] == 200
        except EngineError:
            return False

    def put_weights(self, part: WeightPart) -> None:
        """Keep the folder of a push in mind; the server reads it when the push is committed."""
        self._pushed = part.path.parent
        self._pushed_bytes = len(part.content) + (self._pushed_bytes if part.number else 0)

    @property
    def _load_s(self) -> float:
        """Longest wait for the server to load the push: 60 GB have 20 minutes more than an answer."""
        return self._timeout_s + self._pushed_bytes / _LOAD_BYTES_PER_S

    def _not_loaded(self, policy: PolicyName, error: EngineError, *, then: str = "") -> CallError:
        """Return the error of a push that failed, with what it failed of most often; ``then`` says what else to do."""
        return CallError(
            error.fault if isinstance(error, CallError) else Fault.FAILED,
            f"{self.url} did not load policy version {policy.policy_version} from {self._pushed}: {error}. The server's log "
            "says why. Often its machine or container does not share rollout.weights_dir with the trainer, or its user "
            "cannot read the trainer's files: run both as one user, or give that folder a group and the set-group-id bit"
            f"{then}",
        )

    def try_out(self, sample: Callable[[Request], Completion], *, hint: str = "") -> Completion:
        """Return what ``sample`` makes of a short prompt, once before anything is trained on.

        ``hint`` names a further cause, for the message.

        Raises:
            RecipeError: when what comes back does not fit the model.
            CallError: when the server does not answer.
        """
        # Not the first ids: the embedding of a padding token is zero, and so are its logits.
        prompt_ids = (np.arange(1, 5) * self._facts.vocab_size // 5).astype(np.int32)
        try:
            return sample(Request(request_id=0, prompt_ids=prompt_ids, num_generations=1))
        except CallError as error:
            if error.fault not in (Fault.CORRUPT, Fault.CUT):
                raise
            raise RecipeError(
                "a trial completion failed, so the server serves another model than model.path, or does not return what it "
                f"should{hint}: {error}"
            ) from error

    def _gather(
        self,
        calls: Mapping[int, Coroutine[Any, Any, bytes]],
        keep: Callable[[int, bytes], None],
    ) -> CallError | None:
        """Run calls at once and give each answer to ``keep`` as it comes; return the first failure, if any.

        One answer is read at a time: that of 32k tokens holds 60 MB.

        Raises:
            EngineError: when the server refuses a call; the others are given up.
        """
        failure: CallError | None = None
        begun = {self.begin(call): number for number, call in calls.items()}
        try:
            for call in as_completed(list(begun)):
                try:
                    keep(begun.pop(call), self.result(call))
                except CallError as error:
                    failure = failure or error
        finally:
            for call in begun:
                call.cancel()
        return failure

    async def _waited(self, path: str, body: bytes) -> bytes:
        """Return the body of an answer that may take any time while the server works.

        Raises:
            CallError: the server showed no sign of life for ``timeout_s``, or as `call`.
        """
        loop, limit = asyncio.get_running_loop(), asyncio.timeout(None)

        def heard(piece: bytes) -> None:
            self._last_piece_s = loop.time()

        self._waiting.add(limit)
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._watch_life())
        try:
            async with limit:
                code, answer = await self._answer(
                    "POST", path, body, on_piece=heard, silence_s=None
                )
        except TimeoutError as error:
            raise CallError(
                Fault.SLOW,
                f"{self.url}{path}: the server showed no sign of life for {self._timeout_s:.0f} s (rollout.timeout_s), neither "
                "in its answers nor when it was asked; start it again",
                incident=self._num_silences,
            ) from error
        finally:
            self._waiting.discard(limit)
        return self._good(code, answer, path)

    async def _watch_life(self) -> None:
        """End all calls that wait when the server is silent, as long as any waits."""
        loop = asyncio.get_running_loop()
        heard_s = loop.time()
        while self._waiting:
            await asyncio.sleep(min(_PROBE_S, self._timeout_s / 4))
            if self._last_piece_s > heard_s:
                heard_s = self._last_piece_s
                continue
            try:
                lives = await self._shows_life()
            except EngineError:
                lives = False
            if lives:
                heard_s = loop.time()
            elif loop.time() - max(heard_s, self._last_piece_s) > self._timeout_s:
                self._num_silences += 1
                for limit in self._waiting:
                    if not limit.expired():
                        limit.reschedule(loop.time())
                heard_s = loop.time()

    async def _end(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        await super()._end()
