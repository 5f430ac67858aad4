"""One thread steps vLLM for all callers, so that concurrent calls share each step.

Callers that took turns at stepping would wait for each other: a lock is not fair, and about one
waiting call gets in a step. Here a call only queues what it wants and waits; the thread takes in
every queued call between two steps.

In: a vLLM that has started, prompts with their parameters. Out: vLLM's outputs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from moe_replay.engines.types import RolloutProgress
from moe_replay.errors import EngineError

T = TypeVar("T")
_MEMORY = ("weights", "kv_cache")
"""vLLM's names of its memory, in the order in which it wakes."""
_CLOSED = "the vLLM engine is closed; make a new one"


class _Call:
    """What one caller waits for."""

    def __init__(self, asked: Sequence[tuple[Any, Any]]) -> None:
        # Prompt and sampling parameters of each completion.
        self.asked = asked
        # vLLM's names of the completions, in their order; fewer while they are being added.
        self.names: list[str] = []
        # Name -> last output, of those that have ended.
        self.outputs: dict[str, Any] = {}
        self.failure: BaseException | None = None
        # Whether the caller was interrupted, so that nobody waits any more.
        self.is_left = False
        # Set when there is nothing left to wait for.
        self.ended = threading.Event()


class VllmStepper:
    """Steps one ``LLMEngine``; any thread may `run` calls, which are sampled together.

    ``sleeps`` tells that vLLM's memory is given back whenever nothing runs; a call returns when
    that is done. A push wakes the weights alone, and they stay awake until the next call, which
    wakes the cache beside them: vLLM does not go back to sleep half awake. With ``in_step`` the
    engine is one of several ranks that must take the same steps: a call is then never cut short,
    even if its caller leaves, because the other ranks would wait in the middle of theirs.
    """

    def __init__(self, vllm: Any, *, sleeps: bool, in_step: bool) -> None:
        self._vllm, self._sleeps, self._in_step = vllm, sleeps, in_step
        self._changed = threading.Condition(threading.Lock())
        self._queued: list[_Call] = []
        self._running: list[_Call] = []
        self._over: list[_Call] = []
        self._call_of: dict[str, _Call] = {}
        self._lengths: dict[str, int] = {}
        self._progress = RolloutProgress()
        self._next_name = 0
        self._is_closing = False
        # Tags of vLLM's memory that is not there, in the order in which it wakes.
        self._asleep: tuple[str, ...] = ()
        self._lost: BaseException | None = None
        # Both belong to a thread, and a new one would start with the defaults of the process.
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._thread = threading.Thread(
            target=self._work,
            args=(torch.get_num_threads(), device),
            name="vllm-steps",
            daemon=True,
        )
        self._sleep()
        self._thread.start()

    @property
    def progress(self) -> RolloutProgress:
        """How far the running calls are, all together."""
        return self._progress

    def run(
        self, asked: Sequence[tuple[Any, Any]], *, at_start: Callable[[], T]
    ) -> tuple[T, list[Any]]:
        """Return the value of ``at_start`` when the call was queued, and each last output.

        ``at_start`` may refuse by raising; no push can come between it and the last step. A caller
        that is interrupted leaves nothing running: its completions are aborted before the next
        step.

        Raises:
            EngineError: when vLLM fails, or loses a request.
        """
        call = _Call(asked)
        try:
            with self._changed:
                value = at_start()
                if self._is_closing and self._lost is None:
                    raise EngineError(_CLOSED)
                if self._lost is not None:
                    raise EngineError(
                        f"vLLM failed before and kept requests that cannot be withdrawn ({self._lost}); start it again"
                    )
                if not asked:
                    return value, []
                self._queued.append(call)
                self._changed.notify_all()
            call.ended.wait()
        except BaseException:
            call.is_left = True
            raise
        if call.failure is not None:
            raise EngineError(
                f"vLLM failed with {len(asked) - len(call.outputs)} completions unfinished: "
                f"{type(call.failure).__name__}: {call.failure}"
            ) from call.failure
        return value, [call.outputs[name] for name in call.names]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop vLLM from stepping while the caller changes its weights; new calls wait.

        The weights are awake meanwhile, the key-value cache sleeps on if it does. Calls that were
        left by their callers are waited for.

        Raises:
            EngineError: when a call is under way.
        """
        with self._changed:
            if any(not call.is_left for call in (*self._queued, *self._running)):
                raise EngineError(
                    "weights were pushed while completions are being sampled; wait for generate to return, so that no "
                    "completion mixes two policies"
                )
            self._changed.wait_for(lambda: not self._queued and not self._running)
            self._wake(("weights",))
            yield

    def close(self) -> None:
        """End the thread; running calls fail, except those of several ranks, which end first."""
        with self._changed:
            if self._in_step:
                self._changed.wait_for(lambda: not self._queued and not self._running)
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self, num_threads: int, device: int | None) -> None:
        torch.set_num_threads(num_threads)
        if device is not None:
            torch.cuda.set_device(device)
        try:
            self._take_turns()
        except BaseException as error:  # noqa: BLE001 - the seam: vLLM, from another thread
            # Callers wait for this thread alone, so they must hear of any error.
            self._lost = error
        with self._changed:
            self._is_closing = True
            self._running += self._queued
            self._queued = []
            self._drop(self._running, self._lost or EngineError(_CLOSED))
            self._settle()

    def _take_turns(self) -> None:
        """Take in what is queued, step, and let go what has ended, until the engine is closed."""
        while True:
            with self._changed:
                self._settle()
                self._changed.wait_for(lambda: self._queued or self._running or self._is_closing)
                if self._is_closing:
                    return
                new, self._queued = self._queued, []
                self._running += new
            for call in new:
                self._begin(call)
            if not self._in_step:
                self._drop([call for call in self._running if call.is_left])
            if self._running:
                self._step()

    def _settle(self) -> None:
        """Wake the callers of ended calls, after vLLM sleeps if nothing runs; holds the lock."""
        if not self._running and not self._queued:
            self._lengths, self._progress = {}, RolloutProgress()
            try:
                self._sleep()
            except Exception as error:  # noqa: BLE001 - the seam: vLLM
                self._lost = error
                for call in self._over:
                    call.failure = error
        for call in self._over:
            call.ended.set()
        self._over = []
        self._changed.notify_all()

    def _begin(self, call: _Call) -> None:
        self._count(total=len(call.asked))
        try:
            self._wake(_MEMORY)
            for prompt, params in call.asked:
                name = str(self._next_name)
                self._next_name += 1
                # Before it is added: half of vLLM may know a request that the other half has
                # refused.
                call.names.append(name)
                self._call_of[name] = call
                self._vllm.add_request(name, prompt, params)
        except Exception as error:  # noqa: BLE001 - the seam: vLLM
            self._drop([call], error)

    def _step(self) -> None:
        try:
            if not self._vllm.has_unfinished_requests():
                raise EngineError("vLLM lost requests: it has none left and did not answer all")
            outputs = self._vllm.step()
        except Exception as error:  # noqa: BLE001 - the seam: vLLM
            self._drop(self._running, error)
            return
        tokens = finished = 0
        for output in outputs:
            name = output.request_id
            length = len(output.outputs[0].token_ids)
            tokens += length - self._lengths.get(name, 0)
            self._lengths[name] = length
            if output.finished:
                finished += 1
                call = self._call_of.pop(name)
                call.outputs[name] = output
                if len(call.outputs) == len(call.asked):
                    self._end(call)
        self._count(tokens=tokens, finished=finished)

    def _drop(self, calls: Sequence[_Call], failure: BaseException | None = None) -> None:
        """End calls early, and take what is left of them out of vLLM."""
        for call in list(calls):
            call.failure = failure
            waiting = [name for name in call.names if name not in call.outputs]
            try:
                self._vllm.abort_request(waiting)
            except Exception as error:  # noqa: BLE001 - the seam: vLLM
                self._lost = error
            for name in waiting:
                self._call_of.pop(name, None)
            self._count(total=len(call.outputs) - len(call.asked))
            self._end(call)

    def _end(self, call: _Call) -> None:
        self._running.remove(call)
        self._over.append(call)

    def _count(self, *, total: int = 0, finished: int = 0, tokens: int = 0) -> None:
        now = self._progress
        self._progress = RolloutProgress(
            num_finished=now.num_finished + finished,
            num_total=now.num_total + total,
            num_tokens=now.num_tokens + tokens,
        )

    def _wake(self, tags: Sequence[str]) -> None:
        """Wake what of ``tags`` sleeps, weights first."""
        needed = [tag for tag in self._asleep if tag in tags]
        if needed:
            self._vllm.wake_up(tags=needed)
            self._asleep = tuple(tag for tag in self._asleep if tag not in tags)

    def _sleep(self) -> None:
        """Let all of it sleep, unless some does already, which vLLM takes for all of it."""
        if self._sleeps and not self._asleep:
            self._vllm.sleep(level=1)
            self._asleep = _MEMORY
