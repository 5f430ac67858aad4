"""What the rollout server needs from its engine, and an adapter for those called by one thread."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from moe_replay.checkpoint.facts import checkpoint_tensors
from moe_replay.engines.types import (
    Completion,
    Engine,
    EngineDescription,
    Request,
    RolloutGroup,
    SamplingParams,
)
from moe_replay.engines.weight_stream import finite_weights, folder_tensors
from moe_replay.errors import DivergedError, EngineError

_Result = TypeVar("_Result")


class PushRefused(EngineError):
    """A push failed while it was applied, and the engine holds the weights that it held before."""


class HeldPush:
    """The push whose weights an engine holds, to go back to when the next one fails.

    ``load`` loads the files of a push, or (None) the weights that the engine was started with.
    """

    def __init__(self, load: Callable[[Path | None], Awaitable[None]]) -> None:
        self._load = load
        self._folder: Path | None = None

    async def replace(self, folder: Path) -> None:
        """Load another push, and remove the folder of this one; if that fails, load this one again.

        Raises:
            PushRefused: when it failed and the weights before it are loaded again.
            EngineError: when they could not be loaded either.
        """
        try:
            await self._load(folder)
        except (EngineError, DivergedError) as error:
            try:
                await self._load(self._folder)
            except (EngineError, DivergedError) as second:
                raise EngineError(
                    f"a push failed ({error}), and so did going back to the weights before it "
                    f"({second}): the engine holds neither; start the server again"
                ) from error
            raise PushRefused(f"{error}; the weights before this push stay") from error
        self.remove()
        self._folder = folder

    def remove(self) -> None:
        """Remove its folder."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


@runtime_checkable
class ServedEngine(Protocol):
    """An engine as the server drives it, from one event loop."""

    @property
    def description(self) -> EngineDescription:
        """What this engine is and can return."""
        ...

    async def start(self) -> None:
        """Load the model and start whatever samples with it."""
        ...

    def capacity(self) -> str:
        """Return how much runs at once, such as "43 sequences of 1,536 tokens fit"."""
        ...

    async def complete(
        self,
        request: Request,
        number: int,
        sampling: SamplingParams,
        *,
        policy_version: int,
        progress: Callable[[int], None],
        across: Callable[[], Awaitable[int]] | None = None,
    ) -> Completion:
        """Sample completion ``number`` of ``request``, under the name of ``policy_version``.

        ``progress`` is called with the tokens so far whenever they grow. When the task that awaits
        this is cancelled, the request is aborted wherever it runs. ``across`` is given if the
        completion may cross a push, to an engine that `crosses_pushes`: after `interrupt` it waits
        until the push is loaded, and returns the policy version under which the rest is sampled.

        Raises:
            EngineError: when the engine fails.
            DivergedError: when the model's logits are not numbers.
        """
        ...

    @property
    def crosses_pushes(self) -> bool:
        """Whether completions can go on after a push that interrupts them."""
        ...

    async def interrupt(self) -> None:
        """End all that is sampled, and return when nothing is; see `complete`.

        Raises:
            EngineError: when the engine fails.
        """
        ...

    async def stage(self, folder: Path) -> None:
        """Check the values of a push, whose names and shapes the server has checked.

        It changes nothing.

        Raises:
            EngineError: when the engine cannot load pushes.
            DivergedError: when a weight is not finite.
        """
        ...

    async def apply(self, folder: Path) -> None:
        """Load what was staged; no completion runs meanwhile, and no cached prompt survives it.

        The engine owns ``folder`` from here on, and removes it when a later push has succeeded.

        Raises:
            PushRefused: when it failed and the last good weights are loaded again.
            EngineError: when they could not be loaded either; the engine is broken then.
        """
        ...

    async def lost(self) -> str:
        """Wait until nothing can be sampled any more, and return why; awaited after `start`."""
        ...

    async def close(self) -> None:
        """End everything that `start` started. Calling it twice is allowed."""
        ...


class _Running:
    """One call of a whole request, which the tasks of its completions wait for."""

    call: asyncio.Task[RolloutGroup]

    def __init__(self) -> None:
        self.num_waiting = 0
        self.taken: set[int] = set()


class ThreadedEngine:
    """Serves an `Engine` that samples whole requests, one call at a time, in a thread.

    ``make`` loads it. A failed first push goes back to ``checkpoint``; without one the engine's own
    checks must do. A call whose client left is finished and dropped, unless the engine is
    ``cancellable``: its `generate` then asks ``cancelled()`` between tokens.

    Examples:
        >>> engine = ThreadedEngine(FakeEngine)
        >>> await engine.start()
        >>> await engine.complete(request, 0, sampling, policy_version=0, progress=print)
    """

    def __init__(
        self,
        make: Callable[[], Engine],
        *,
        checkpoint: Path | None = None,
        cancellable: bool = False,
    ) -> None:
        self._make, self._checkpoint = make, checkpoint
        self._is_cancellable = cancellable
        self._made: Engine | None = None
        self._turn = asyncio.Lock()
        # By identity of the request: two calls may ask for one id at the same time.
        self._running: dict[int, _Running] = {}
        self._held = HeldPush(self._load)

    @property
    def description(self) -> EngineDescription:
        """What this engine is and can return; there once it has started."""
        return self._engine.description

    async def start(self) -> None:
        """Load the engine.

        Raises:
            MoeReplayError: as its class does.
        """
        self._made = await in_thread(self._make)

    @property
    def crosses_pushes(self) -> bool:
        """Whether completions go on after a push; they do not."""
        return False

    async def interrupt(self) -> None:
        """Do nothing: nothing that runs may cross a push."""

    def capacity(self) -> str:
        """Return how much runs at once."""
        return "one request is sampled at a time"

    async def complete(
        self,
        request: Request,
        number: int,
        sampling: SamplingParams,
        *,
        policy_version: int,
        progress: Callable[[int], None],
        across: Callable[[], Awaitable[int]] | None = None,
    ) -> Completion:
        """Return completion ``number`` of ``request``; all its completions are sampled in one call.

        ``progress`` is called once, at the end.

        Raises:
            EngineError: when the engine fails.
            DivergedError: when the model's logits are not numbers.
        """
        running = self._running.get(id(request))
        if running is None:
            running = self._running[id(request)] = _Running()
            running.call = asyncio.create_task(self._group(request, sampling, running))
        running.num_waiting += 1
        try:
            group = await asyncio.shield(running.call)
        finally:
            running.num_waiting -= 1
            running.taken.add(number)
            if not running.num_waiting:
                running.call.cancel()
            if not running.num_waiting or len(running.taken) == request.num_generations:
                self._running.pop(id(request), None)
        progress(len(group.completions[number].token_ids))
        return _under(group.completions[number], policy_version, self.description)

    async def stage(self, folder: Path) -> None:
        """Check the values of a push.

        Raises:
            DivergedError: when a weight is not finite.
        """

        def check() -> None:
            for _ in finite_weights(folder_tensors(folder)):
                continue

        await in_thread(check)

    async def apply(self, folder: Path) -> None:
        """Load a staged push, or go back to the weights before it.

        Raises:
            PushRefused: when it failed and the last good weights are loaded again.
            EngineError: when they could not be loaded either.
        """
        async with self._turn:
            await self._held.replace(folder)

    async def lost(self) -> str:
        """Wait forever: an engine of this process ends with it."""
        await asyncio.Event().wait()
        raise AssertionError

    async def close(self) -> None:
        """Close the engine, once the call that runs has ended. Calling it twice is allowed."""
        if self._made is not None:
            async with self._turn:
                await in_thread(self._made.close)

    @property
    def _engine(self) -> Engine:
        if self._made is None:
            raise EngineError("the engine is still being loaded")
        return self._made

    async def _group(
        self, request: Request, sampling: SamplingParams, running: _Running
    ) -> RolloutGroup:
        # A call that is cancelled while it waits for its turn samples nothing.
        async with self._turn:
            work = partial(self._engine.generate, [request], sampling)
            if self._is_cancellable:
                work = partial(work, cancelled=lambda: not running.num_waiting)
            (group,) = await in_thread(work)
            return group

    async def _load(self, folder: Path | None) -> None:
        """Load a push, or (None) the checkpoint, unless the engine itself checks pushes."""
        if folder is not None:
            weights = folder_tensors(folder)
        elif self._checkpoint is not None:
            weights = checkpoint_tensors(self._checkpoint)
        else:
            return
        # The engine counts every push that it ever got; runs count their own.
        version = self._engine.policy_version + 1
        await in_thread(lambda: self._engine.load_weights(weights, policy_version=version))


def _under(
    completion: Completion, policy_version: int, description: EngineDescription
) -> Completion:
    """Return the completion with the policy version of the run in place of the engine's."""
    trace = completion.trace
    if trace is not None:
        origin = description.origin(policy_version=policy_version, num_rows=len(trace))
        trace = replace(trace, origin=origin)
    return replace(completion, trace=trace, policy_version=policy_version)


async def in_thread(work: Callable[[], _Result]) -> _Result:
    """Run ``work`` in a thread, to its end; see `to_its_end`."""
    return await to_its_end(asyncio.to_thread(work))


async def to_its_end(work: Coroutine[Any, Any, _Result]) -> _Result:
    """Await ``work`` to its end even when the waiting task is cancelled; raise that afterwards.

    Its caller may hold a lock while the engine is busy, which it is until the work ends.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        # Looked at, or the loop would log an error that nobody waits for.
        if not task.cancelled():
            task.exception()
        raise
