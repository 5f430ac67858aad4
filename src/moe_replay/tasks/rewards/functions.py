"""Find and import the reward functions that a recipe names, and read their signatures.

Importing runs user code, so it happens in the reward process; the trainer itself loads only
built-ins.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from moe_replay.errors import RecipeError, nearest_of
from moe_replay.tasks.rewards.builtin import BUILTIN_REWARDS
from moe_replay.tasks.rewards.user_code import describe_error

OWN_NAMES = frozenset({"completions", "prompts", "completion_ids"})
"""Arguments that every reward function may take; they would hide columns of the same name."""
NAMED_ONLY = frozenset({"trainer_state", "log_metric", "dataset"})
"""Those that ``**kwargs`` do not get: only a function that names them, and only where no column
has the name."""


class TrainerState(NamedTuple):
    """Where the run is, for a reward function that takes ``trainer_state``."""

    global_step: int
    """Finished steps."""
    max_steps: int
    """Steps of the run."""


class MetricLog:
    """What one call of a function logs with ``log_metric``."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}

    def add(self, name: str, value: float) -> None:
        """Log a value, to be averaged over calls and ranks.

        Raises:
            TypeError: the name is not a text.
            ValueError: the value is not a finite number.
        """
        if not isinstance(name, str) or not name:
            raise TypeError(f"log_metric got the name {name!r}, expected a text")
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"log_metric got {name} = {number}, expected a finite number")
        total, count = self.sums.get(name, [0.0, 0.0])
        self.sums[name] = [total + number, count + 1]


class Signature(NamedTuple):
    """The arguments that a reward function takes."""

    required: Sequence[str]
    """Names without a default, except those that every call passes."""
    accepted: Sequence[str]
    """Names of its arguments."""
    takes_everything: bool
    """Whether it has ``**kwargs``, and so gets every column."""
    is_async: bool = False
    """Whether it is an ``async def``."""

    def takes(self, name: str) -> bool:
        """Return whether a call may pass ``name``."""
        return self.takes_everything or name in self.accepted


def load_function(name: str, args: Mapping[str, Any]) -> tuple[Callable[..., Any], Signature]:
    """Find a built-in function, or import the module or file of another one.

    Raises:
        RecipeError: it cannot be found, does not take ``completions``, or does not take one of
            ``args``.
    """
    function = BUILTIN_REWARDS[name] if name in BUILTIN_REWARDS else _find(name)
    return function, _signature(name, function, args)


def _signature(name: str, function: Callable[..., Any], args: Mapping[str, Any]) -> Signature:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise RecipeError(f"reward {name}: its signature cannot be read: {error}") from error
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    accepted = tuple(p.name for p in by_name)
    takes_everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    positional_only = any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in parameters)
    if positional_only or ("completions" not in accepted and not takes_everything):
        raise RecipeError(
            f"reward {name}({', '.join(map(str, parameters))}) takes no argument named completions: write "
            "it as def f(completions, *, <dataset columns>) -> list[float]"
        )
    own = sorted(set(args) & OWN_NAMES)
    if own:
        raise RecipeError(
            f"reward {name}: [rewards.args] sets {', '.join(own)}, which every call passes: remove it"
        )
    unknown = sorted(set(args) - set(accepted))
    if unknown and not takes_everything:
        raise RecipeError(
            f"reward {name}: [rewards.args] sets {', '.join(unknown)}, but it takes {', '.join(accepted)}: "
            "rename or remove it"
        )
    required = {p.name for p in by_name if p.default is p.empty} - OWN_NAMES - NAMED_ONLY
    is_async = inspect.iscoroutinefunction(function)
    return Signature(sorted(required), accepted, takes_everything, is_async)


def _find(spelled: str) -> Callable[..., Any]:
    source, colon, name = spelled.rpartition(":")
    if not colon or not source:
        raise RecipeError(
            f"rewards.function {spelled!r} is not one of {', '.join(BUILTIN_REWARDS)}{nearest_of(spelled, BUILTIN_REWARDS)}, and not of the form "
            "module:function or file.py:function"
        )
    module = import_source(source)
    function = getattr(module, name, None)
    if not callable(function) or isinstance(function, type):
        known = [n for n, value in vars(module).items() if inspect.isfunction(value)]
        problem = (
            "has no function"
            if function is None
            else f"has a {type(function).__name__}, not a function,"
        )
        raise RecipeError(
            f"rewards.function {spelled!r}: {source} {problem} {name!r}; its functions are "
            f"{', '.join(known) or 'none'}"
        )
    return function


def import_source(source: str, key: str = "rewards.function") -> ModuleType:
    """Import a module by its name, or by its file where ``source`` ends with ``.py``.

    Raises:
        RecipeError: that fails; ``key`` is what names it.
    """
    if source.endswith(".py"):
        return _import_file(Path(source), key)
    return _import_module(source, key)


def _import_module(name: str, key: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    # Whatever user code raises on import, even SystemExit, is reported as its failure.
    except BaseException as error:
        raise RecipeError(
            f"{key}: module {name!r} cannot be imported: {describe_error(error)}. Install it, put it beside "
            "the recipe, or name a file as path/to/file.py:name"
        ) from error


def _import_file(path: Path, key: str) -> ModuleType:
    if not path.is_file():
        raise RecipeError(
            f"{key}: file {path} does not exist (relative paths start at the recipe's folder)"
        )
    path = path.absolute()
    root, dotted = _package_of(path)
    # Like Python with the folder of a script: files beside it can be imported.
    if root not in sys.path:
        sys.path.insert(0, root)
    try:
        found = importlib.util.find_spec(dotted)
        if found is not None and found.origin is not None and Path(found.origin) == path:
            # Under its own name, its neighbours and the processes that it starts can import it.
            return importlib.import_module(dotted)
        return _import_under_another_name(path)
    except BaseException as error:
        raise RecipeError(f"{key}: {path} cannot be imported: {describe_error(error)}") from error


def _package_of(path: Path) -> tuple[str, str]:
    """Return the folder to import a file from, and its dotted name within packages."""
    folder, parts = path.parent, [path.stem] if path.stem != "__init__" else []
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    return str(folder), ".".join(parts)


def _import_under_another_name(path: Path) -> ModuleType:
    """Import a file whose name is taken by another module, such as a second rewards.py."""
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    name = f"moe_replay_reward_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    # Dataclasses and pickles of the file look up their module there.
    sys.modules[name] = module
    try:
        module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
