"""The process of environments: user code that models act in runs here, one call after the other.

A call that takes longer than its limit is interrupted by an alarm. One that cannot be, in native
code say, is ended with the process by the trainer.

In: frames: a class to load, then conversations to begin, to act in and to score. Out: a frame
before each call into user code, and one for each conversation, in order.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import random
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from moe_replay.errors import RecipeError
from moe_replay.tasks.environments.loading import Description, load_environment, tool_methods
from moe_replay.tasks.rewards.functions import describe_error
from moe_replay.tasks.rewards.wire import decode_value
from moe_replay.tasks.rewards.worker import (
    WrongAnswer,
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


class _Worker:
    """Instances of one class, by the number of the conversation that uses them."""

    def __init__(self, answers: int) -> None:
        self._answers = answers
        self._timeout_s = 0.0
        self._form = ""
        self._make: Callable[[], Any] = lambda: None
        self._description: Description | None = None
        self._instances: dict[int, Any] = {}
        self._slot = 0
        self._loop = asyncio.new_event_loop()

    def answer(self, request: Mapping[str, Any], blob: bytes) -> None:
        """Handle a request: an event before each call into user code, and one after it."""
        if request["op"] == "load":
            self._load(request)
        else:
            call = {"reset": self._reset, "act": self._act, "reward": self._reward}[request["op"]]
            for item in request["items"]:
                self._slot = item["slot"]
                repair_streams()
                try:
                    told = call(item)
                except BaseException as error:  # noqa: BLE001 - the seam: the user's code
                    self._say(
                        event="failed",
                        slot=item["slot"],
                        text=self._text(error),
                        trace=trace_of(error),
                    )
                else:
                    self._say(event="done", slot=item["slot"], value=told)
        self._say(event="finished")

    def _load(self, request: Mapping[str, Any]) -> None:
        for folder in reversed(request["folders"]):
            sys.path.insert(0, folder)
        # The import of a class may be that of a large library.
        self._timeout_s, self._form = request["load_timeout_s"], request["form"]
        try:
            args = decode_value(request["args"])
            with self._limited():
                self._make, self._description = load_environment(
                    request["factory"], self._form, args
                )
        except RecipeError as error:
            self._say(event="failed", slot=0, text=str(error), trace=trace_of(error.__cause__))
        except _Late:
            limit = request["load_timeout_s"]
            text = f"environment.factory {request['factory']!r}: its import took over {limit:g} s"
            self._say(event="failed", slot=0, text=text, trace="")
        else:
            self._say(event="done", slot=0, value=self._description.plain())
        self._timeout_s = request["timeout_s"]

    def _reset(self, item: Mapping[str, Any]) -> Any:
        """Begin a conversation; those with one seed and one row begin alike."""
        assert self._description is not None
        slot, seed = item["slot"], item["seed"]
        row = {name: decode_value(value) for name, value in item["row"].items()}
        row = {"seed": seed, **row}
        if not self._description.takes_everything:
            row = {name: row[name] for name in self._description.takes if name in row}
        elif "seed" not in self._description.takes and "seed" not in item["row"]:
            del row["seed"]
        old = self._instances.pop(slot, None)
        if old is not None and self._form == "gym":
            self._called(old.close)
        random.seed(seed)
        if (numpy := sys.modules.get("numpy")) is not None:
            numpy.random.seed(seed % 2**32)
        # A new one, as after a resume: the last conversation leaves it no state.
        with self._limited():
            self._instances[slot] = self._make()
        told = self._called(self._instances[slot].reset, **row)
        if told is None or isinstance(told, str) or self._form == "gym":
            return told
        raise WrongAnswer(
            f"returned {type(told).__name__}, expected a text that is added to the prompt, or None"
        )

    def _act(self, item: Mapping[str, Any]) -> dict[str, Any]:
        instance = self._instances[item["slot"]]
        if self._form == "tools":
            results = [self._tool(instance, call) for call in item["calls"]]
            return {
                "texts": [text for text, _ in results],
                "num_failed": sum(failed for _, failed in results),
                "is_over": False,
            }
        try:
            told = self._called(instance.step, item["text"])
            finished = getattr(instance, "finished", False)
            finished = bool(self._called(finished) if callable(finished) else finished)
            is_over = told is None or finished
            texts = [] if is_over else [self._as_text(told)]
        except BaseException as error:  # noqa: BLE001 - the seam: the user's code
            return {"texts": [_error_text(error, self._late)], "num_failed": 1, "is_over": False}
        return {"texts": texts, "num_failed": 0, "is_over": is_over}

    def _tool(self, instance: Any, call: Mapping[str, Any]) -> tuple[str, bool]:
        """Return what a tool says to the model, and whether it failed."""
        tools = dict(tool_methods(instance))
        if call["error"] is not None:
            return json.dumps({"error": call["error"]}), True
        if call["name"] not in tools:
            text = f"there is no tool {call['name']}; the tools are {', '.join(tools)}"
            return json.dumps({"error": text}), True
        try:
            told = self._called(tools[call["name"]], **call["arguments"])
            return self._as_text(told), False
        except BaseException as error:  # noqa: BLE001 - the seam: the user's code
            return _error_text(error, self._late), True

    def _reward(self, item: Mapping[str, Any]) -> float | None:
        (score,) = checked_scores([self._called(self._instances[item["slot"]].get_reward)], 1)
        return score

    def _as_text(self, told: Any) -> str:
        # Writing a foreign object runs its code.
        return told if isinstance(told, str) else self._called(str, told)

    def _called(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return what a method returns, awaited if need be, within the limit."""
        with self._limited():
            result = method(*args, **kwargs)
            if not inspect.isawaitable(result):
                return result
            try:
                return self._loop.run_until_complete(_own(result))
            except _Late:
                for task in asyncio.all_tasks(self._loop):
                    task.cancel()
                raise

    @contextmanager
    def _limited(self) -> Iterator[None]:
        # It restarts the trainer's own limit.
        self._say(event="started", slot=self._slot)
        # User code may have an alarm of its own.
        signal.signal(signal.SIGALRM, _interrupt)
        signal.setitimer(signal.ITIMER_REAL, self._timeout_s)
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


async def _own(result: Awaitable[Any]) -> Any:
    return await result
