"""The trainer's requests to its reward process, and their outcomes.

Every request ends with an answer for each function, or the reason why there is none. After a crash
or a timeout, the next request starts a new process.
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
"""Maximum start-up time of the interpreter."""


Scores = Sequence[float | None]
"""The scores that a function returned, one a completion; None where it has no opinion."""
Logged = Mapping[str, tuple[float, int]]
"""Name -> sum and count of what functions have logged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a function returned."""

    scores: Scores
    """One a completion."""
    logged: Logged
    """What the call logged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a function gave no scores, or could not be loaded."""

    kind: Literal["refused", "raised", "wrong", "late", "crashed", "stopped"]
    """It cannot be loaded; raised; did not return scores; timed out; ended the process; was stopped
    when another function ended the process."""
    text: str
    """What happened, starting with "returned ..." or "raised ...", with the line of user code if
    known."""
    sample: int | None = None
    """Index of the completion, if known."""
    trace: str = ""
    """Its traceback."""

    def cause(self) -> Exception | None:
        """Return the traceback, if any, as an error to raise from."""
        return _RewardTraceback(self.trace) if self.trace else None


class _RewardTraceback(Exception):
    """The traceback of a reward function in its own process, as text."""

    def __str__(self) -> str:
        return f"in the reward process:\n{self.args[0]}"


class RewardProcess:
    """The process that runs the reward functions of a run; the first request starts it."""

    def __init__(self, functions: Sequence[Mapping[str, Any]], folders: Sequence[str] = ()) -> None:
        """Take functions, each ``{"function": ..., "args": ..., "timeout_s": ...}``."""
        self._functions = list(functions)
        self._folders = list(folders)
        self._child: Child | None = None
        self._lock = threading.Lock()

    def load(self) -> list[Signature | Failure]:
        """Import every function in a new process; return its signature, or why that failed."""
        with self._lock:
            self._end()
            return self._start()

    def score(
        self, batch: Mapping[str, Any], blob: bytes, functions: Sequence[int]
    ) -> list[Answer | Failure]:
        """Call functions, given by index, on a batch; return their outcomes in that order."""
        with self._lock:
            if self._child is None:
                refused = [r for r in self._start() if isinstance(r, Failure)]
                if refused:
                    return [refused[0]] * len(functions)
            request = {"op": "score", "functions": list(functions)} | dict(batch)
            events = self._ask(request, blob, functions)
        return [
            each
            if isinstance(each, Failure)
            else Answer(
                scores=each["scores"],
                logged={name: (float(t), int(n)) for name, (t, n) in each["logged"].items()},
            )
            for each in (events[index] for index in functions)
        ]

    def interrupt(self) -> None:
        """End the process from another thread: a call that waits for it fails."""
        child = self._child
        if child is not None:
            child.interrupt()

    def close(self) -> None:
        """End the process and all of its children; another request starts a new one."""
        with self._lock:
            self._end()

    def _start(self) -> list[Signature | Failure]:
        self._child = Child()
        # A child that is never closed ends with its owner, at the latest with the interpreter.
        weakref.finalize(self, self._child.kill)
        request = {"op": "load", "functions": self._functions, "folders": self._folders}
        events = self._ask(request, b"", range(len(self._functions)))
        return [
            event if isinstance(event, Failure) else Signature(**event["signature"])
            for _, event in sorted(events.items())
        ]

    def _end(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None

    def _ask(
        self, request: Mapping[str, Any], blob: bytes, functions: Sequence[int]
    ) -> dict[int, Failure | dict[str, Any]]:
        """Send a request and collect the outcome of each function."""
        assert self._child is not None
        pending = _Request(limits={n: self._functions[n]["timeout_s"] for n in functions})
        try:
            self._child.send(pack_frame(request, blob), pending.deadline)
            while not pending.is_over:
                pending.take(self._child.receive(pending.deadline))
        except ChildGone as gone:
            pending.end_crashed(str(gone))
            self._end()
        except ChildSilent:
            where = self._child.where_it_stands()
            self._child.kill()
            self._child = None
            pending.end_late(where)
        except BaseException:
            # Its late answers would be taken for answers to the next request.
            self._child.kill()
            self._child = None
            raise
        return pending.events


class _Request:
    """One request: the running functions with their deadlines, and the outcomes of the others."""

    def __init__(self, limits: Mapping[int, float]) -> None:
        self._limits = limits
        self._until: dict[int, float] = {}
        # Before a function starts, the interpreter starts or the batch is sent.
        self._idle_until = time.monotonic() + _START_S + max(limits.values())
        self.events: dict[int, Failure | dict[str, Any]] = {}
        self.is_over = False

    @property
    def deadline(self) -> float:
        """Time by which the process must send another event."""
        return min(self._until.values(), default=self._idle_until)

    def take(self, event: dict[str, Any]) -> None:
        """Record an event of the process."""
        kind = event["event"]
        if kind == "finished":
            self.is_over = True
            return
        index: int = event["function"]
        if kind in ("started", "waiting"):
            grace = GRACE_S if kind == "waiting" else 0.0
            self._until[index] = time.monotonic() + self._limits[index] + grace
        else:
            self._until.pop(index, None)
            self.events[index] = event if kind in ("loaded", "scores") else self._failure(event)

    def end_late(self, where: str) -> None:
        """Record for every unfinished function that the process was killed, and which was late."""
        now = time.monotonic()
        for index in self._limits.keys() - self.events.keys():
            if self._until.get(index, math.inf if self._until else now) <= now:
                failure = Failure(kind="late", text=self._late(index, where))
            else:
                failure = Failure(kind="stopped", text="was stopped when another function was late")
            self.events[index] = failure

    def end_crashed(self, text: str) -> None:
        """Record for every unfinished function that the process ended, and which were running."""
        for index in self._limits.keys() - self.events.keys():
            if index in self._until or not self._until:
                failure = Failure(kind="crashed", text=text)
            else:
                failure = Failure(kind="stopped", text="was not called: the process had ended")
            self.events[index] = failure

    def _failure(self, event: dict[str, Any]) -> Failure:
        kind, text = event["event"], event.get("text", "")
        if kind == "late":
            text = self._late(event["function"], event["where"])
        elif kind == "raised":
            text = f"raised {text}"
        return Failure(
            kind=kind, text=text, sample=event.get("sample"), trace=event.get("trace", "")
        )

    def _late(self, index: int, where: str) -> str:
        at = f", at {where}" if where else ""
        return f"was still running after {self._limits[index]:g} s{at}"
