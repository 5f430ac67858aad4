"""The process of environments: user code that models act in runs here.

Plain code runs one call after the other. Conversations that wait for async code alone do so
together, up to a bound. A call that takes longer than its limit is cancelled where it waits, and
interrupted by an alarm where it computes; one that cannot be, in native code say, is ended with the
process by the trainer. Alarm and trainer time each step of async code, from one wait to the next,
by itself: many steps may follow each other before the loop turns.

In: frames: a class to load, then conversations to begin, to act in and to score. Out: a frame
before each call into user code and each step of async code, and one for each conversation, in
order.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import random
import signal
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Coroutine, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import Any

from moe_replay.errors import RecipeError
from moe_replay.tasks.environments.loading import (
    Offer,
    load_environment,
    stepping_method,
    tool_methods,
)
from moe_replay.tasks.rewards.user_code import describe_error
from moe_replay.tasks.rewards.wire import decode_value
from moe_replay.tasks.rewards.worker import (
    WrongAnswer,
    awaited,
    checked_scores,
    repair_streams,
    send_event,
    serve,
    trace_of,
)


def main(requests: int, answers: int, life: int, stacks: int) -> None:
    """Serve environments, see `moe_replay.tasks.rewards.worker.serve`."""
    serve(requests, answers, life, stacks, make=_Worker)


class _Late(BaseException):
    """A call has taken longer than its limit; no `Exception`, which user code may swallow."""


_SLOT: ContextVar[int | None] = ContextVar("_SLOT", default=None)
"""The conversation that user code runs for, in the task of a call and in those it starts."""


class _Steps(Coroutine[Any, Any, Any]):
    """A coroutine whose every step, from one wait to the next, is run by ``around``."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], around: Callable[..., Any]) -> None:
        self._coroutine, self._around = coroutine, around

    def send(self, value: Any) -> Any:
        return self._around(self._coroutine.send, value)

    def throw(self, *error: Any) -> Any:
        return self._around(self._coroutine.throw, *error)

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._coroutine.__await__()


class _Worker:
    """Instances of one class, by the number of the conversation that uses them."""

    def __init__(self, answers: int) -> None:
        self._answers = answers
        self._timeout_s = 0.0
        self._form = ""
        self._offer: Offer | None = None
        self._instances: dict[int, Any] = {}
        self._loop = asyncio.new_event_loop()
        self._loop.set_task_factory(self._task)
        # Seconds in steps of all conversations, and of each.
        self._spent_s, self._own_s = 0.0, defaultdict[int | None, float](float)
        self._places = asyncio.Semaphore(1)

    def answer(self, request: Mapping[str, Any], blob: bytes) -> None:
        """Handle a request: an event before each call into user code, and one after it."""
        if request["op"] == "load":
            self._load(request)
        else:
            self._answer_items(request["op"], request["items"])
        self._say(event="finished")

    def _answer_items(self, op: str, items: Sequence[Mapping[str, Any]]) -> None:
        outcomes: dict[int, dict[str, Any]] = {}

        async def answer(number: int) -> None:
            outcomes[number] = await self._outcome(op, items[number])

        together = [n for n, item in enumerate(items) if self._waits(op, item)]
        # Plain code would stand in the way of what waits, so it comes first and alone.
        for number in sorted(set(range(len(items))) - set(together)):
            self._run(answer(number))
        if together:

            async def answer_all() -> None:
                await asyncio.gather(*map(answer, together))

            self._run(answer_all())
        for number in range(len(items)):
            self._say(**outcomes[number])

    def _waits(self, op: str, item: Mapping[str, Any]) -> bool:
        """Return whether a conversation only waits, in async code. Beginning it is never that."""
        if op == "reset":
            return False
        instance = self._instances[item["slot"]]
        if op == "reward":
            return inspect.iscoroutinefunction(instance.get_reward)
        if self._form != "tools":
            return inspect.iscoroutinefunction(stepping_method(instance))
        tools = self._tools(instance)
        called = [tools[call["name"]] for call in item["calls"] if call["name"] in tools]
        return bool(called) and all(map(inspect.iscoroutinefunction, called))

    async def _outcome(self, op: str, item: Mapping[str, Any]) -> dict[str, Any]:
        call = {"reset": self._reset, "act": self._act, "reward": self._reward}[op]
        repair_streams()
        try:
            told = await call(item)
        except BaseException as error:  # noqa: BLE001 - the seam: the user's code
            text, trace = self._text(error), trace_of(error)
            return {"event": "failed", "slot": item["slot"], "text": text, "trace": trace}
        return {"event": "done", "slot": item["slot"], "value": told}

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine of this class; whatever else ends the loop only interrupts it."""
        watch = self._loop.create_task(self._watch())
        running = self._loop.create_task(coroutine)
        while not running.done():
            try:
                self._loop.run_until_complete(running)
            # An alarm between two tasks, or a SystemExit in a task that user code started.
            except BaseException:  # noqa: BLE001 - the seam: the user's code
                if not running.done():
                    traceback.print_exc()
        watch.cancel()
        signal.setitimer(signal.ITIMER_REAL, 0)
        running.result()

    async def _watch(self) -> None:
        """Put the alarm off for as long as the loop runs: it is for code that does not return."""
        while True:
            # Each step of a task sets it.
            await asyncio.sleep(self._timeout_s / 4)

    def _task(
        self, loop: asyncio.AbstractEventLoop, coroutine: Any, **keys: Any
    ) -> asyncio.Task[Any]:
        return asyncio.Task(_Steps(coroutine, self._stepped), loop=loop, **keys)

    def _stepped(self, step: Callable[..., Any], *given: Any) -> Any:
        """Run a step of a task, with an alarm and an event of its own, and count its time."""
        self._begin(_SLOT.get())
        began = time.monotonic()
        try:
            return step(*given)
        finally:
            # What the loop itself does until the next step has its time, too.
            signal.setitimer(signal.ITIMER_REAL, self._timeout_s)
            spent = time.monotonic() - began
            self._spent_s += spent
            self._own_s[_SLOT.get()] += spent

    def _begin(self, slot: int | None) -> None:
        """Start the time of code that runs without a pause, here and in the trainer."""
        # An alarm would cut the event.
        signal.setitimer(signal.ITIMER_REAL, 0)
        if slot is not None:
            self._say(event="started", slot=slot)
        # User code may have an alarm of its own.
        signal.signal(signal.SIGALRM, _interrupt)
        signal.setitimer(signal.ITIMER_REAL, self._timeout_s)

    def _clock(self, slot: int) -> float:
        """Return the time without that in which others held up a conversation."""
        return time.monotonic() - (self._spent_s - self._own_s[slot])

    def _load(self, request: Mapping[str, Any]) -> None:
        for folder in reversed(request["folders"]):
            sys.path.insert(0, folder)
        # The import of a class may be that of a large library.
        self._timeout_s, self._form = request["load_timeout_s"], request["form"]
        try:
            args = decode_value(request["args"])
            with self._limited():
                self._offer = load_environment(
                    request["factory"], request["tools"], self._form, args
                )
        except RecipeError as error:
            self._say(event="failed", slot=0, text=str(error), trace=trace_of(error.__cause__))
        except _Late:
            limit = request["load_timeout_s"]
            what = ", ".join([request["factory"] or "", *request["tools"]]).strip(", ")
            text = f"[environment] {what}: its import took over {limit:g} s"
            self._say(event="failed", slot=0, text=text, trace="")
        else:
            self._say(event="done", slot=0, value=self._offer.description.plain())
        self._timeout_s = request["timeout_s"]
        self._places = asyncio.Semaphore(request["max_concurrent_calls"])

    async def _reset(self, item: Mapping[str, Any]) -> Any:
        """Begin a conversation; those with one seed and one row begin alike."""
        assert self._offer is not None
        description = self._offer.description
        slot, seed = item["slot"], item["seed"]
        row = {name: decode_value(value) for name, value in item["row"].items()}
        row = {"seed": seed, **row}
        if not description.takes_everything:
            row = {name: row[name] for name in description.takes if name in row}
        elif "seed" not in description.takes and "seed" not in item["row"]:
            del row["seed"]
        old = self._instances.pop(slot, None)
        if old is not None and self._form == "gym":
            await self._called(slot, old.close)
        random.seed(seed)
        if (numpy := sys.modules.get("numpy")) is not None:
            numpy.random.seed(seed % 2**32)
        # A new one, as after a resume: the last conversation leaves it no state.
        self._instances[slot] = await self._called(slot, self._offer.make)
        told = await self._called(slot, self._instances[slot].reset, **row)
        if told is None or isinstance(told, str) or self._form == "gym":
            return told
        raise WrongAnswer(
            f"returned {type(told).__name__}, expected a text that is added to the prompt, or None"
        )

    async def _act(self, item: Mapping[str, Any]) -> dict[str, Any]:
        slot, instance = item["slot"], self._instances[item["slot"]]
        if self._form == "tools":
            results = [await self._tool(slot, instance, call) for call in item["calls"]]
            return {
                "texts": [text for text, _ in results],
                "num_failed": sum(failed for _, failed in results),
                "is_over": False,
            }
        try:
            told = await self._called(slot, instance.step, item["text"])
            finished = getattr(instance, "finished", False)
            if callable(finished):
                finished = await self._called(slot, finished)
            is_over = told is None or bool(finished)
            texts = [] if is_over else [await self._as_text(slot, told)]
        except BaseException as error:  # noqa: BLE001 - the seam: the user's code
            return {"texts": [_error_text(error, self._late)], "num_failed": 1, "is_over": False}
        return {"texts": texts, "num_failed": 0, "is_over": is_over}

    def _tools(self, instance: Any) -> dict[str, Callable[..., Any]]:
        assert self._offer is not None
        return {**dict(tool_methods(instance)), **self._offer.functions}

    async def _tool(self, slot: int, instance: Any, call: Mapping[str, Any]) -> tuple[str, bool]:
        """Return what a tool says to the model, and whether it failed."""
        tools = self._tools(instance)
        if call["error"] is not None:
            return json.dumps({"error": call["error"]}), True
        if call["name"] not in tools:
            text = f"there is no tool {call['name']}; the tools are {', '.join(tools)}"
            return json.dumps({"error": text}), True
        try:
            told = await self._called(slot, tools[call["name"]], **call["arguments"])
            return await self._as_text(slot, told), False
        except BaseException as error:  # noqa: BLE001 - the seam: the user's code
            return _error_text(error, self._late), True

    async def _reward(self, item: Mapping[str, Any]) -> float | None:
        slot = item["slot"]
        (score,) = checked_scores([await self._called(slot, self._instances[slot].get_reward)], 1)
        return score

    async def _as_text(self, slot: int, told: Any) -> str:
        # Writing a foreign object runs its code.
        return told if isinstance(told, str) else await self._called(slot, str, told)

    async def _called(
        self, slot: int, method: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        """Return what a method returns, awaited if need be, within the limit."""
        async with self._places:
            self._begin(slot)
            result = method(*args, **kwargs)
            if not inspect.isawaitable(result):
                return result
            context = copy_context()
            context.run(_SLOT.set, slot)
            task = self._loop.create_task(awaited(result), context=context)
            until = self._clock(slot) + self._timeout_s
            while not task.done() and (left := until - self._clock(slot)) > 0:
                await asyncio.wait({task}, timeout=left)
            if not task.done():
                task.cancel()
                raise _Late
        error, value = task.result()
        if error is not None:
            raise error
        return value

    @contextmanager
    def _limited(self) -> Iterator[None]:
        self._begin(0)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    @property
    def _late(self) -> str:
        return f"was still running after {self._timeout_s:g} s (environment.timeout_s)"

    def _text(self, error: BaseException) -> str:
        if isinstance(error, WrongAnswer):
            return error.text
        return self._late if isinstance(error, _Late) else f"raised {describe_error(error)}"

    def _say(self, **event: Any) -> None:
        send_event(self._answers, event)


def _interrupt(*_: object) -> None:
    raise _Late


def _error_text(error: BaseException, late: str) -> str:
    """Return an error as the model reads it: its message alone, as in TRL."""
    try:
        text = late if isinstance(error, _Late) else str(error) or type(error).__name__
    except Exception:  # noqa: BLE001 - the seam: the user's exception
        text = type(error).__name__
    return json.dumps({"error": text[:2000]})
