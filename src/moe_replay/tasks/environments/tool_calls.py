"""Find the tool calls in what a model wrote.

A parser is a function from text to calls, and a line of `PARSERS`. A call that cannot be read is a
call with an error, which the model is told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

_BLOCK = re.compile(r"<tool_call>(.*?)(?:</tool_call>|(?=<tool_call>)|\Z)", re.DOTALL)
_MAX_LEVELS = 64
"""Of lists and objects in each other: far below what JSON, and a tool's own code, can follow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One call of a tool."""

    name: str
    """The tool; ``""`` where that cannot be read."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """By name."""
    error: str | None = None
    """Why it cannot be read, for the model; None for a call that can."""

    def plain(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return {"name": self.name, "arguments": self.arguments, "error": self.error}


def hermes(text: str) -> list[ToolCall]:
    """Read ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``: Hermes, Qwen and others.

    >>> hermes('so <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>')
    [ToolCall(name='add', arguments={'a': 1}, error=None)]
    """
    return [_hermes_call(block) for block in _BLOCK.findall(text)]


def _hermes_call(block: str) -> ToolCall:
    try:
        call = json.loads(block)
    except (ValueError, RecursionError) as error:
        return ToolCall(name="", error=f"the tool call is not valid JSON: {error}")
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return ToolCall(name="", error='expected {"name": ..., "arguments": {...}}')
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        return ToolCall(name=call["name"], error="arguments must be a JSON object")
    if _is_deep(arguments):
        text = f"arguments may have at most {_MAX_LEVELS} lists and objects in each other"
        return ToolCall(name=call["name"], error=text)
    return ToolCall(name=call["name"], arguments=arguments)


def _is_deep(value: Any) -> bool:
    """Return whether lists and objects are more than `_MAX_LEVELS` deep; without recursion."""
    level = [value]
    for _ in range(_MAX_LEVELS + 1):
        held = [each for each in level if isinstance(each, dict | list)]
        level = [
            item for each in held for item in (each.values() if isinstance(each, dict) else each)
        ]
        if not held:
            return False
    return True


PARSERS: Mapping[str, Callable[[str], list[ToolCall]]] = {"hermes": hermes}
"""``environment.tool_parser`` -> what reads a turn."""
