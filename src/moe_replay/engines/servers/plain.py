"""What vLLM and SGLang servers share: answers without a time limit, pushes as files, a trial.

Such a server draws by its own noise unless it was started otherwise. Then a completion that is
asked for again is another one, and a time limit would keep the short ones: so only silence of the
entire server ends a call.
"""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moe_replay.checkpoint.facts import ModelFacts
from moe_replay.engines.checks import check_group
from moe_replay.engines.serve.messages import PolicyName, Progress, Status
from moe_replay.engines.servers.contract import Ask
from moe_replay.engines.servers.faults import CallError, Fault
from moe_replay.engines.servers.http import HttpCalls
from moe_replay.engines.servers.push_files import WeightPart
from moe_replay.engines.types import Completion, Request, RolloutGroup, SamplingParams
from moe_replay.engines.vllm.wire import FLAG
from moe_replay.errors import EngineError, RecipeError, TraceError
from moe_replay.routing import LayerOrder

# Maximum time between two checks of a server that sends nothing.
_PROBE_S = 15.0
# Maximum wait for a server to say that it is up.
_UP_S = 10.0
# Loading this many bytes may take one second more: from a network's disk, on a busy machine.
_LOAD_BYTES_PER_S = 50 << 20


class PlainCalls(HttpCalls, ABC):
    """One server of another project. Threads may call it at the same time."""

    how_to_record: str = (
        f"it was started without {FLAG}, or its model has no routers; start it with that flag"
    )
    reads_files: bool = True
    returns_candidates: bool = False
    draws_by_seed: bool = False
    """Whether equal seeds give equal completions, as far as `status` has found out."""
    generate_path: str
    """Path that completions are asked for at."""
    weights_path: str
    """Path whose answer names the weights that the server holds."""

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
        # One a server: what its payloads show of the order of its layers adds up.
        self._layer_order = LayerOrder()
        self._pushed: Path | None = None
        self._pushed_bytes = 0
        self._waiting: set[asyncio.Timeout] = set()
        self._watch: asyncio.Task[None] | None = None
        self._last_piece_s = 0.0
        self._num_silences = 0

    @abstractmethod
    async def _shows_life(self) -> bool:
        """Return whether the server has worked on anything since the last call."""

    @abstractmethod
    def _message(self, ask: Ask, number: int) -> dict[str, Any]:
        """Return the body of the call for completion ``number``."""

    @abstractmethod
    def _completion(self, answer: Any, ask: Ask, *, where: str) -> Completion:
        """Return the completion of an answer; refuse one that names other weights."""

    async def _answer_to(self, message: dict[str, Any]) -> bytes:
        """Return the answer to a message."""
        return await self._waited(self.generate_path, json.dumps(message, allow_nan=False).encode())

    def complete(
        self,
        ask: Ask,
        *,
        keep: Callable[[int, Completion], None],
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        """Sample what is asked for, one call a completion; no progress is reported.

        Raises:
            RecipeError: when this server cannot sample so that log-probabilities are the policy's.
            EngineError: when the server refuses the request itself.
            CallError: when some could not be sampled; the others were kept.
        """
        alone = replace(ask.request, num_generations=1)

        def read(number: int, answer: bytes) -> None:
            where = f"{self.url}: request {alone.request_id}, completion {number}"
            try:
                told = self.parsed(answer, self.generate_path)
                completion = self._completion(told, ask, where=where)
                group = RolloutGroup(request=alone, completions=(completion,))
                check_group(group, ask.description)
            except CallError:
                raise
            except (TraceError, EngineError) as error:
                raise CallError(Fault.CORRUPT, str(error)) from error
            keep(number, completion)

        # All before the first is sent, as one may be refused.
        messages = {number: self._message(ask, number) for number in ask.numbers}
        self._gather({n: self._answer_to(message) for n, message in messages.items()}, read)

    def biases(self, error: CallError) -> bool:
        """Return whether sampling again what a failed call lost prefers some completions."""
        # What other weights sampled is not missed: the policy did not draw it.
        if self.draws_by_seed or error.fault is Fault.STALE:
            return False
        # Death of the server does not depend on one completion; its silence may.
        return error.incident is not None or self.is_up()

    def is_up(self) -> bool:
        """Return whether the server and its engine are alive, after a call has failed."""
        try:
            return self.exchange("GET", "/health", silence_s=min(_UP_S, self._timeout_s))[0] == 200
        except EngineError:
            return False

    def put_weights(self, part: WeightPart) -> None:
        """Remember where the push was written; the server reads it when the push is committed."""
        self._pushed = part.path.parent
        self._pushed_bytes = part.num_bytes + (self._pushed_bytes if part.number else 0)

    @property
    def _load_s(self) -> float:
        """Time limit for loading the push: 60 GB have 20 minutes more than an answer."""
        return self._timeout_s + self._pushed_bytes / _LOAD_BYTES_PER_S

    def _not_loaded(self, policy: PolicyName, error: EngineError, *, then: str = "") -> CallError:
        """Return the error of a failed push with its usual causes, and ``then`` what else to do."""
        return CallError(
            error.fault if isinstance(error, CallError) else Fault.FAILED,
            f"{self.url} did not load policy version {policy.policy_version} from {self._pushed}: "
            f"{error}. The server's log says why. Often its machine or container does not share "
            "rollout.weights_dir with the trainer, or its user cannot read the trainer's files: run "
            f"both as one user, or give that folder a group and the set-group-id bit{then}",
        )

    def _policy(self) -> PolicyName:
        """Return the name of the weights that the server holds."""
        told = self.call_json("GET", self.weights_path)
        if not isinstance(told, dict) or "weight_version" not in told:
            raise CallError(
                Fault.CORRUPT,
                f"{self.url}{self.weights_path} answers {str(told)[:80]}, expected a weight_version; "
                "it is not a server of a known release",
            )
        return PolicyName.read(told["weight_version"])

    def _check_held(self, policy: PolicyName) -> None:
        """Raise `CallError` unless the server holds the weights that were just pushed."""
        held = self._policy()
        if held != policy:
            raise CallError(
                Fault.STALE,
                f"{self.url} holds {held} after it was pushed {policy}; another trainer pushes to it: "
                "give each run servers of its own",
            )

    def _try_out(self, sampling: SamplingParams, status: Status, *, hint: str = "") -> Completion:
        """Return a completion of a short prompt, sampled before anything is trained on.

        ``hint`` names a further cause, for the message.

        Raises:
            RecipeError: when what comes back does not fit the model.
            CallError: when the server does not answer.
        """
        # Not the first ids: the embedding of a padding token is zero, and so are its logits.
        prompt_ids = (np.arange(1, 5) * self._facts.vocab_size // 5).astype(np.int32)
        kept: dict[int, Completion] = {}
        ask = Ask(
            request=Request(request_id=0, prompt_ids=prompt_ids, num_generations=1),
            numbers=(0,),
            sampling=sampling,
            policy=status.policy,
            description=status.description,
        )
        try:
            self.complete(ask, keep=kept.__setitem__)
        except CallError as error:
            if error.fault not in (Fault.CORRUPT, Fault.CUT):
                raise
            raise RecipeError(
                "a trial completion failed, so the server serves another model than model.path, or "
                f"does not return what it should{hint}: {error}"
            ) from error
        return kept[0]

    def _gather(
        self,
        calls: Mapping[int, Coroutine[Any, Any, bytes]],
        keep: Callable[[int, bytes], None],
    ) -> None:
        """Run calls at once and pass each answer to ``keep``.

        One answer is read at a time: one of 32k tokens has 60 MB.

        Raises:
            CallError: the first one, after all other calls have ended.
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
        if failure is not None:
            raise failure

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
                f"{self.url}{path}: the server showed no sign of life for {self._timeout_s:.0f} s "
                "(rollout.timeout_s), neither in its answers nor when it was asked; start it again",
                incident=self._num_silences,
            ) from error
        finally:
            self._waiting.discard(limit)
        return self._good(code, answer, path)

    async def _watch_life(self) -> None:
        """End all waiting calls when the server is silent, as long as any waits."""
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
