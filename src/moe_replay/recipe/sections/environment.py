"""The section of an environment, in which a model acts over several turns."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from moe_replay.recipe.sections.base import Key, Section
from moe_replay.recipe.sections.locations import anchored_function


class EnvironmentSection(Section):
    """``[environment]``: what the model acts in over several turns."""

    factory: Annotated[
        str, Key(anchor=anchored_function, also_called=("class", "environment_factory"))
    ]
    """``file.py:Class``, or ``module:Class`` of a module beside the recipe or an installed one."""
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

    @property
    def name(self) -> str:
        """Of its reward in metrics: the class."""
        return self.factory.rpartition(":")[2]
