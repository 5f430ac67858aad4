"""The trainer's requests to the process of its environments, and what came of them."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from moe_replay.errors import RecipeError, RewardError
from moe_replay.recipe.sections.environment import EnvironmentSection
from moe_replay.tasks.chat_messages import excerpt
from moe_replay.tasks.environments.loading import Description
from moe_replay.tasks.environments.tool_calls import ToolCall
from moe_replay.tasks.rewards.child import GRACE_S, Child, ChildGone, ChildSilent
from moe_replay.tasks.rewards.wire import encode_value, pack_frame

_MODULE = "moe_replay.tasks.environments.worker"
_START_S = 300.0
"""Maximum start-up time of the interpreter, and of the import of the class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Where a conversation begins."""

    slot: int
    """Number of the conversation among those that are open."""
    seed: int
    """The same for all conversations of a group."""
    row: Mapping[str, Any]
    """Columns of the item, and its ``prompt``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """What the model did in a turn."""

    slot: int
    """As `Start.slot`."""
    text: str
    """What it wrote."""
    calls: Sequence[ToolCall]
    """Tools that it calls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reaction:
    """What the environment did then."""

    texts: tuple[str, ...]
    """One a call, or the next message to the model; none when it is over."""
    num_failed: int
    """Calls that failed."""
    is_over: bool
    """Whether the environment has ended the conversation."""


class EnvironmentProcess:
    """The environments of a run and the process that runs them; close it, or use it in ``with``."""

    def __init__(self, section: EnvironmentSection, folders: Sequence[str] = ()) -> None:
        self._section, self._folders = section, list(folders)
        self._child: Child | None = None
        self._lock = threading.Lock()
        self.description = self._start()

    def reset(self, starts: Sequence[Start]) -> list[str | list[dict[str, str]] | None]:
        """Begin conversations; return what each adds to its prompt, or the chat that replaces it.

        Raises:
            RewardError: one fails, or takes too long.
        """
        items = [{"slot": s.slot, "seed": s.seed, "row": self._encoded(s.row)} for s in starts]
        return [self._value(event, "reset") for event in self._ask("reset", items)]

    def act(self, actions: Sequence[Action]) -> list[Reaction]:
        """Let the model's actions happen; errors of tools are texts for the model.

        Raises:
            RewardError: the process ended, or a call could not be interrupted.
        """
        items = [
            {
                "slot": action.slot,
                "text": action.text,
                "calls": [call.plain() for call in action.calls],
            }
            for action in actions
        ]
        values = [self._value(event, "step") for event in self._ask("act", items)]
        return [
            Reaction(
                texts=tuple(value["texts"]),
                num_failed=value["num_failed"],
                is_over=value["is_over"],
            )
            for value in values
        ]

    def rewards(self, slots: Sequence[int]) -> Float64[np.ndarray, " slots"]:
        """Return what each conversation earned; NaN where its environment has no opinion.

        Raises:
            RewardError: one fails, or takes too long.
        """
        events = self._ask("reward", [{"slot": slot} for slot in slots])
        scores = [self._value(event, "get_reward") for event in events]
        return np.array([np.nan if score is None else score for score in scores], dtype=np.float64)

    def close(self) -> None:
        """End the process."""
        with self._lock:
            if self._child is not None:
                self._child.close()
                self._child = None

    def __enter__(self) -> EnvironmentProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> Description:
        self._child = Child(_MODULE)
        weakref.finalize(self, self._child.kill)
        section = self._section
        request = {
            "op": "load",
            "factory": section.factory,
            "tools": list(section.tools),
            "max_concurrent_calls": section.max_concurrent_calls,
            "form": section.form,
            "args": encode_value(section.args),
            "timeout_s": section.timeout_s,
            "load_timeout_s": _START_S,
            "folders": self._folders,
        }
        (event,) = self._exchange(request, 1)
        if event["event"] == "failed":
            self._child.close()
            self._child = None
            raise RecipeError(event["text"]) from _cause(event)
        return Description(**event["value"])

    def _ask(self, op: str, items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        if not items:
            return []
        with self._lock:
            if self._child is None:
                self._start()
            return self._exchange({"op": op, "items": list(items)}, len(items))

    def _exchange(self, request: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
        """Send a request and collect the outcome of each of its items."""
        child = self._child
        limit = GRACE_S + (_START_S if request["op"] == "load" else self._section.timeout_s)
        assert child is not None
        name, running, outcomes = self._section.what, None, []
        deadline = time.monotonic() + _START_S + limit
        try:
            child.send(pack_frame(request), deadline)
            while (event := child.receive(deadline))["event"] != "finished":
                # Of one call into user code, of which an item may have many.
                deadline = time.monotonic() + limit
                if event["event"] == "started":
                    running = event["slot"]
                else:
                    outcomes.append(event)
        except ChildGone as gone:
            self._end()
            raise RewardError(
                f"environment {name} {gone} (during {request['op']} of conversation {running}). An "
                "environment must return or raise: ending its process ends the run"
            ) from None
        except ChildSilent:
            where = child.where_it_stands()
            self._end()
            raise RewardError(
                f"environment {name} was still running after {limit:g} s, at {where or 'native code'} "
                f"(during {request['op']} of conversation {running}), and could not be interrupted. "
                "Raise environment.timeout_s if it needs more time; otherwise check what it waits for"
            ) from None
        except BaseException:
            # Its late answers would be taken for answers to the next request.
            self._end()
            raise
        assert len(outcomes) == count
        return outcomes

    def _end(self) -> None:
        assert self._child is not None
        self._child.kill()
        self._child = None

    def _value(self, event: Mapping[str, Any], method: str) -> Any:
        if event["event"] == "done":
            return event["value"]
        raise RewardError(
            f"environment {self._section.what}: {method} {event['text']}. A tool may fail, and the "
            f"model is told; {method} must return"
        ) from _cause(event)

    def _encoded(self, row: Mapping[str, Any]) -> dict[str, Any]:
        wanted = self.description
        encoded = {}
        for name, value in row.items():
            if wanted.takes_everything or name in wanted.takes:
                try:
                    encoded[name] = encode_value(value)
                except (TypeError, RecursionError) as error:
                    raise RewardError(
                        f"column {name} holds {excerpt(value)}, which cannot be sent to an environment in "
                        f"its own process: {error}. Convert the column, or name the arguments of reset"
                    ) from error
        return encoded


class _EnvironmentTraceback(Exception):
    """The traceback of an environment in its own process, as text."""

    def __str__(self) -> str:
        return f"in the process of environments:\n{self.args[0]}"


def _cause(event: Mapping[str, Any]) -> Exception | None:
    return _EnvironmentTraceback(event["trace"]) if event["trace"] else None
