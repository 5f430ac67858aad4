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

Plain functions, typed and with docstrings too, are tools beside or without a class.

Source: TRL 1.16, ``GRPOTrainer`` (``environment_factory``, ``tools``); ms-swift, ``Env`` of its gym
plugin.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moe_replay.errors import RecipeError, shortened
from moe_replay.tasks.environments.gym import GymAdapter
from moe_replay.tasks.rewards.functions import import_source
from moe_replay.tasks.rewards.user_code import describe_error

KEY, TOOLS_KEY = "environment.factory", "environment.tools"
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What an environment is made of, in its own process."""

    make: Callable[[], Any]
    """Makes an instance."""
    functions: Mapping[str, Callable[..., Any]]
    """Tools by name that belong to no class."""
    description: Description
    """What it offers."""


class _ToolsAlone:
    """What conversations act in where there is no class: it has no state."""

    def reset(self) -> None:
        """Begin."""


def load_environment(
    factory: str | None, tools: Sequence[str], form: str, args: Mapping[str, Any]
) -> Offer:
    """Import a class, make one instance, import plain functions, and return what they offer.

    Raises:
        RecipeError: something cannot be found or made, or its form is another one.
    """
    make, name = _maker(factory, form, args) if factory is not None else (_ToolsAlone, "")
    instance = make()
    methods = dict(tool_methods(instance)) if form == "tools" else {}
    functions = _plain_tools(tools, methods)
    if form == "tools" and not methods and not functions:
        raise RecipeError(
            f"{KEY} {factory!r}: {type(instance).__name__} has no tool: no public method beside "
            "reset and get_reward. Add one, name functions in environment.tools, or set "
            "environment.form = 'step' for a class with def step(self, text) -> str | None"
        )
    if form == "step" and not callable(getattr(instance, "step", None)):
        raise RecipeError(
            f"{KEY} {factory!r}: {type(instance).__name__} has no method step: add def step(self, "
            "text) -> str | None, or set environment.form = 'tools'"
        )
    parameters = inspect.signature(instance.reset).parameters.values()
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    schemas = [_schema(name, each, is_method=True) for name, each in methods.items()]
    schemas += [_schema(name, each, is_method=False) for name, each in functions.items()]
    description = Description(
        name=name,
        tools=schemas,
        has_reward=callable(getattr(instance, "get_reward", None)),
        takes=[p.name for p in by_name],
        takes_everything=any(p.kind is p.VAR_KEYWORD for p in parameters),
        required=[p.name for p in by_name if p.default is p.empty],
    )
    return Offer(make=make, functions=functions, description=description)


def _maker(factory: str, form: str, args: Mapping[str, Any]) -> tuple[Callable[[], Any], str]:
    """Return what makes instances of a class, which is tried, and its name."""
    found, name = _found(factory, KEY, "Class")

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
    return make, name


def _plain_tools(
    spelled: Sequence[str], methods: Mapping[str, object]
) -> dict[str, Callable[..., Any]]:
    """Return the functions that a recipe names as tools, by their own names."""
    functions: dict[str, Callable[..., Any]] = {}
    for each in spelled:
        function, name = _found(each, TOOLS_KEY, "function")
        if name in functions or name in methods:
            raise RecipeError(f"{TOOLS_KEY}: two tools are called {name!r}: rename one of them")
        functions[name] = function
    return functions


def _found(spelled: str, key: str, what: str) -> tuple[Callable[..., Any], str]:
    """Import a class or function, and return it with its name."""
    source, colon, name = spelled.rpartition(":")
    if not colon or not source:
        raise RecipeError(f"{key} {spelled!r} is not of the form file.py:{what} or module:{what}")
    found = getattr(import_source(source, key), name, None)
    if not callable(found):
        raise RecipeError(
            f"{key} {spelled!r}: {source} has no class or function {name!r}: check the spelling"
        )
    return found, name


def stepping_method(instance: Any) -> Callable[..., Any]:
    """Return the user's own method that steps an environment."""
    return instance.inner_step if isinstance(instance, GymAdapter) else instance.step


def tool_methods(instance: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield the tools of an instance by name: its public methods beside reset and get_reward."""
    # Of the class: on the instance this would evaluate properties.
    for name, _ in inspect.getmembers(type(instance), inspect.isfunction):
        if not name.startswith("_") and name not in _NOT_TOOLS:
            yield name, getattr(instance, name)


def _schema(name: str, method: Callable[..., Any], *, is_method: bool) -> dict[str, Any]:
    from transformers.utils import get_json_schema

    try:
        schema = get_json_schema(method)
    # transformers raises several kinds, also where a type hint cannot be resolved.
    except Exception as error:
        what = f"{KEY}: the public method {name}" if is_method else f"{TOOLS_KEY}: {name}"
        private = f", or name the method _{name} if it is not a tool" * is_method
        raise RecipeError(
            f"{what} is a tool, and its schema cannot be made: {str(error)[:500]}. Give each argument "
            f"a type and a line under Args: in its docstring{private}"
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
