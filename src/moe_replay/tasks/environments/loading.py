"""Find the class of an environment and what of it is a tool, in the process of environments.

The class form is TRL's ``environment_factory``: no base class, ``reset(**row) -> str | None``,
public typed methods with docstrings as tools, and optionally ``get_reward() -> float``::

    class Calculator:
        def reset(self, *, answer: str, **row) -> None:
            self.answer = answer

        def add(self, a: int, b: int) -> int:
            '''Add two numbers. Args: a: first  b: second'''   # in Google's form, on lines
            return a + b

With ``form = "step"`` it has one method instead of tools, ``step(text) -> str | None``: the next
message to the model, or None when it is over. ``finished``, a flag or a method, may end it too.

Source: TRL 1.16, ``GRPOTrainer`` (``environment_factory``); ms-swift, ``Env`` of its gym plugin.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moe_replay.errors import RecipeError, shortened
from moe_replay.tasks.environments.gym import GymAdapter
from moe_replay.tasks.rewards.functions import describe_error, import_source

KEY = "environment.factory"
_NOT_TOOLS = frozenset({"reset", "get_reward"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What an environment offers; plain values, as they travel between processes."""

    name: str
    """Of the class."""
    tools: list[dict[str, Any]]
    """JSON schemas of its tools, as chat templates take them; empty for one that is stepped."""
    has_reward: bool
    """Whether it scores what was done in it."""
    takes: list[str]
    """Arguments of ``reset`` by name."""
    takes_everything: bool
    """Whether ``reset`` has ``**kwargs``, and so gets every column."""
    required: list[str]
    """Those without a default."""

    def plain(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return asdict(self)


def load_environment(
    factory: str, form: str, args: Mapping[str, Any]
) -> tuple[Callable[[], Any], Description]:
    """Import a class, make one instance, and return what makes instances and what they offer.

    Raises:
        RecipeError: it cannot be found or made, or its form is another one.
    """
    source, colon, name = factory.rpartition(":")
    if not colon or not source:
        raise RecipeError(f"{KEY} {factory!r} is not of the form file.py:Class or module:Class")
    found = getattr(import_source(source, KEY), name, None)
    if not callable(found):
        raise RecipeError(
            f"{KEY} {factory!r}: {source} has no class or function {name!r}: check the spelling"
        )

    def make() -> Any:
        return GymAdapter(found, args) if form == "gym" else found(**args)

    try:
        instance = make()
    except BaseException as error:
        raise RecipeError(
            f"{KEY} {factory!r}: {name}({', '.join(f'{k}={v!r}' for k, v in args.items())}) failed: "
            f"{describe_error(error)}. Its arguments are those of [environment.args]"
        ) from error
    if not callable(getattr(instance, "reset", None)):
        raise RecipeError(
            f"{KEY} {factory!r}: {type(instance).__name__} has no method reset, which begins a "
            "conversation: def reset(self, **row) -> str | None"
        )
    tools = (
        [] if form != "tools" else [_schema(name, each) for name, each in tool_methods(instance)]
    )
    if form == "tools" and not tools:
        raise RecipeError(
            f"{KEY} {factory!r}: {type(instance).__name__} has no tool: no public method beside "
            "reset and get_reward. Add one, or set environment.form = 'step' for a class with "
            "def step(self, text) -> str | None"
        )
    if form == "step" and not callable(getattr(instance, "step", None)):
        raise RecipeError(
            f"{KEY} {factory!r}: {type(instance).__name__} has no method step: add def step(self, "
            "text) -> str | None, or set environment.form = 'tools'"
        )
    parameters = inspect.signature(instance.reset).parameters.values()
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return make, Description(
        name=name,
        tools=tools,
        has_reward=callable(getattr(instance, "get_reward", None)),
        takes=[p.name for p in by_name],
        takes_everything=any(p.kind is p.VAR_KEYWORD for p in parameters),
        required=[p.name for p in by_name if p.default is p.empty],
    )


def tool_methods(instance: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield the tools of an instance by name: its public methods beside reset and get_reward."""
    # Of the class: on the instance this would evaluate properties.
    for name, _ in inspect.getmembers(type(instance), inspect.isfunction):
        if not name.startswith("_") and name not in _NOT_TOOLS:
            yield name, getattr(instance, name)


def _schema(name: str, method: Callable[..., Any]) -> dict[str, Any]:
    from transformers.utils import get_json_schema

    try:
        schema = get_json_schema(method)
    # transformers raises several kinds, also where a type hint cannot be resolved.
    except Exception as error:
        raise RecipeError(
            f"{KEY}: the public method {name} is a tool, and its schema cannot be made: "
            f"{str(error)[:500]}. Give each argument a type and a line under Args: in its docstring, "
            f"or name the method _{name} if it is not a tool"
        ) from error
    schema["function"].pop("return", None)
    return schema


def check_columns(description: Description, columns: frozenset[str], key: str) -> None:
    """Raise `RecipeError` unless a dataset has every column that ``reset`` requires."""
    missing = sorted(set(description.required) - columns - {"prompt", "seed"})
    if missing:
        raise RecipeError(
            f"{KEY}: {description.name}.reset needs {shortened(missing)}, but the columns of {key} are "
            f"{shortened(sorted(columns)) or 'none'}: add the column, or give the argument a default"
        )
