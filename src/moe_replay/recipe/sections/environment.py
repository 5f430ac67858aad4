"""The section of an environment, in which a model acts over several turns."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from moe_replay.recipe.sections.base import Key, Section, Several
from moe_replay.recipe.sections.locations import anchored_function


class EnvironmentSection(Section):
    """``[environment]``: what the model acts in over several turns."""

    factory: Annotated[
        str | None, Key(anchor=anchored_function, also_called=("class", "environment_factory"))
    ] = None
    """``file.py:Class``, or ``module:Class`` of a module beside the recipe or an installed one;
    needed unless there are ``tools``."""
    tools: Annotated[Several[str], Key(anchor=anchored_function)] = ()
    """Plain functions that are tools, as ``file.py:function`` or ``module:function``, beside the
    methods of the class or without one."""
    form: Literal["tools", "step", "gym"] = "tools"
    """``tools``: TRL's class, whose public methods are tools. ``step``: a class with
    ``step(text) -> str | None``, the next message. ``gym``: ms-swift's ``Env``."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the class; for ``gym`` the table that it takes."""
    max_turns: int = Field(default=16, gt=0, le=255)
    """Maximum number of turns of the model in a conversation."""
    tool_parser: Literal["hermes"] = "hermes"
    """How tool calls are written: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``."""
    weight: float = 1.0
    """Factor of its ``get_reward`` in the reward."""
    timeout_s: Annotated[float, Key(may_change=True)] = Field(default=60.0, gt=0)
    """Longest time that one call into it may take; a tool that takes longer is interrupted, and the
    model is told."""
    max_concurrent_calls: Annotated[int, Key(may_change=True)] = Field(default=64, gt=0)
    """Calls of async tools that may wait at the same time, on each rank."""

    @property
    def name(self) -> str:
        """Of its reward in metrics: the class; empty without one."""
        return (self.factory or "").rpartition(":")[2]

    @property
    def what(self) -> str:
        """What it is called in messages: the class, or its functions."""
        return self.factory or ", ".join(self.tools)
