"""What the trainer asks of its reward process, and what it makes of the answers.

Every request has an end: an answer for each function, or the reason why there is none. A process that has crashed or was ended
for not answering is replaced by a fresh one at the next request.

In: reward specifications, batches. Out: `Signature`, `Scores`, `Failure`.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moe_replay.tasks.rewards.child import GRACE_S, Child, ChildGone, ChildSilent
from moe_replay.tasks.rewards.functions import Signature
from moe_replay.tasks.rewards.wire import pack_frame

_START_S = 300.0
"""Longest wait for the interpreter itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What a function gave to a batch."""

    values: tuple[float | None, ...]
    """One for each completion; None where it has no opinion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a function gave no scores, or could not be loaded."""

    kind: Literal["refused", "raised", "wrong", "late", "crashed", "stopped"]
    """It cannot be loaded; raised; returned something else than scores; ran out of time; ended the process; went with the
    process that another one ended."""
    text: str
    """What happened, from "returned ..." or "raised ..." on, with the line of the user's code where it is known."""
    sample: int | None = None
    """Completion that it is about, where that is known."""
    trace: str = ""
    """Its traceback."""


class RewardProcess:
    """One process that holds the reward functions of a run; started by the first request."""

    def __init__(self, functions: Sequence[Mapping[str, Any]], folders: Sequence[str] = ()) -> None:
        """Take functions, each ``{"function": ..., "args": ..., "timeout_s": ...}``, and folders to import from first."""
        self._functions = list(functions)
        self._folders = list(folders)
        self._child: Child | None = None
        self._lock = threading.Lock()

    def load(self) -> list[Signature | Failure]:
        """Import every function in a fresh process; return what each takes, or why it cannot be had."""
        with self._lock:
            self._end()
            return self._start()

    def score(
        self, batch: Mapping[str, Any], blob: bytes, functions: Sequence[int]
    ) -> list[Scores | Failure]:
        """Call functions, given by their numbers, on a batch; their outcomes in that order."""
        with self._lock:
            if self._child is None:
                refused = [r for r in self._start() if isinstance(r, Failure)]
                if refused:
                    return [refused[0]] * len(functions)
            request = {"op": "score", "functions": list(functions)} | dict(batch)
            events = self._ask(request, blob, functions)
        outcomes: list[Scores | Failure] = []
        for number in functions:
            event = events[number]
            outcomes.append(
                event if isinstance(event, Failure) else Scores(values=tuple(event["scores"]))
            )
        return outcomes

    def close(self) -> None:
        """End the process and all that it has started; it may be used again."""
        with self._lock:
            self._end()

    def _start(self) -> list[Signature | Failure]:
        self._child = Child()
        # A child that nobody closes is ended with its owner, at the latest with the interpreter.
        weakref.finalize(self, self._child.kill)
        request = {"op": "load", "functions": self._functions, "folders": self._folders}
        events = self._ask(request, b"", range(len(self._functions)))
        return [
            event if isinstance(event, Failure) else Signature.from_plain(event["signature"])
            for _, event in sorted(events.items())
        ]

    def _end(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None

    def _ask(
        self, request: Mapping[str, Any], blob: bytes, functions: Sequence[int]
    ) -> dict[int, Failure | dict[str, Any]]:
        """Send a request and collect what happens to each function."""
        assert self._child is not None
        talk = _Talk(limits={n: self._functions[n]["timeout_s"] for n in functions})
        try:
            self._child.send(pack_frame(request, blob), talk.deadline)
            while not talk.is_over:
                talk.take(self._child.receive(talk.deadline))
        except ChildGone as gone:
            talk.end_crashed(gone.text)
            self._end()
        except ChildSilent:
            where = self._child.where_it_stands()
            self._child.kill()
            self._child = None
            talk.end_late(where)
        except BaseException:
            # What is still to come from it would be taken for the answer to the next request.
            self._child.kill()
            self._child = None
            raise
        return talk.events


class _Talk:
    """One request: which functions run, until when, and what has become of the others."""

    def __init__(self, limits: Mapping[int, float]) -> None:
        self._limits = limits
        self._until: dict[int, float] = {}
        # Until a function starts, it is the interpreter, or the sending of the batch, that may take time.
        self._idle_until = time.monotonic() + _START_S + max(limits.values())
        self.events: dict[int, Failure | dict[str, Any]] = {}
        self.is_over = False

    @property
    def deadline(self) -> float:
        """When the process must have said something more."""
        return min(self._until.values(), default=self._idle_until)

    def take(self, event: dict[str, Any]) -> None:
        """Note what the process said."""
        kind = event["event"]
        if kind == "finished":
            self.is_over = True
            return
        number: int = event["function"]
        if kind in ("started", "waiting"):
            grace = GRACE_S if kind == "waiting" else 0.0
            self._until[number] = time.monotonic() + self._limits[number] + grace
        else:
            self._until.pop(number, None)
            self.events[number] = event if kind in ("loaded", "scores") else self._failure(event)

    def end_late(self, where: str) -> None:
        """Note for every function without an outcome that the process was ended, and which one was the reason."""
        now = time.monotonic()
        for number in self._limits.keys() - self.events.keys():
            if self._until.get(number, math.inf if self._until else now) <= now:
                failure = Failure(kind="late", text=self._late(number, where))
            else:
                failure = Failure(kind="stopped", text="was stopped when another function was late")
            self.events[number] = failure

    def end_crashed(self, text: str) -> None:
        """Note for every function without an outcome that the process has ended, and which ones were running."""
        for number in self._limits.keys() - self.events.keys():
            if number in self._until or not self._until:
                failure = Failure(kind="crashed", text=text)
            else:
                failure = Failure(kind="stopped", text="was not called: the process had ended")
            self.events[number] = failure

    def _failure(self, event: dict[str, Any]) -> Failure:
        kind, text = event["event"], event.get("text", "")
        if kind == "late":
            text = self._late(event["function"], event["where"])
        elif kind == "raised":
            text = f"raised {text}"
        return Failure(
            kind=kind, text=text, sample=event.get("sample"), trace=event.get("trace", "")
        )

    def _late(self, number: int, where: str) -> str:
        at = f", at {where}" if where else ""
        return f"was still running after {self._limits[number]:g} s{at}"
