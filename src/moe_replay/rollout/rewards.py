"""Reward functions: found before the run starts, called with what they ask for, and held to one finite number a sample.

A reward function is called by keyword with lists that hold one entry per completion::

    def my_reward(completions, *, prompts, completion_ids, answer, tolerance=0.1, **columns) -> list[float]: ...

``completions`` and ``prompts`` are texts, ``completion_ids`` token ids, every other name is a dataset column or a key of
``[rewards.args]``. Only names that the function takes are passed. It may be ``async``; all async functions of a batch
run together.

In: specifications, prompts, completions. Out: `RewardSet`, `ScoredBatch`. Called by: grpo.
"""

from __future__ import annotations

import asyncio
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Float64

from moe_replay.errors import RecipeError, RewardError
from moe_replay.rollout.builtin_rewards import BUILTIN_REWARDS
from moe_replay.rollout.prompts import Prompt, PromptSource

_OWN_NAMES = frozenset({"completions", "prompts", "completion_ids"})
_RULE = "A reward function returns one finite number for each completion; return 0.0 where it has no opinion"


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSpec:
    """What a recipe says about one reward function."""

    function: str
    """Name of a built-in, ``module:function`` or ``file.py:function``."""
    weight: float = 1.0
    """Factor of its score in the total."""
    name: str
    """Name in metrics and messages."""
    args: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments passed on every call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredBatch:
    """What a batch of n completions earned."""

    scores: Mapping[str, Float64[np.ndarray, " n"]]
    """Reward function -> ``[n]`` scores before weights."""
    total: Float64[np.ndarray, " n"]
    """``[n]`` weighted sums."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardFunction:
    """One reward function, and which arguments it takes."""

    spec: RewardSpec
    """Where it came from."""
    function: Callable[..., Any]
    """The function itself."""
    required: frozenset[str]
    """Names without a default, other than those that every call has."""
    accepted: frozenset[str]
    """Names that it takes."""
    takes_everything: bool
    """Whether it has ``**kwargs`` and so gets every column."""

    def arguments(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
    ) -> dict[str, Any]:
        """Return the keyword arguments of a call."""
        columns = prompts[0].columns if prompts else dict.fromkeys(self.required)
        offered: dict[str, Any] = {
            name: [prompt.columns[name] for prompt in prompts] for name in columns
        }
        offered |= {
            "completions": list(completions),
            "prompts": [prompt.text for prompt in prompts],
            "completion_ids": [list(ids) for ids in completion_ids],
        }
        offered |= self.spec.args
        if self.takes_everything:
            return offered
        return {name: value for name, value in offered.items() if name in self.accepted}


class RewardSet:
    """The reward functions of a run."""

    def __init__(self, functions: Sequence[RewardFunction]) -> None:
        self._functions = tuple(functions)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the functions, in the order of the recipe."""
        return tuple(function.spec.name for function in self._functions)

    @staticmethod
    def load(specs: Sequence[RewardSpec]) -> RewardSet:
        """Find every function; modules and files are imported here.

        Raises:
            RecipeError: when one cannot be found, does not take ``completions``, or does not take one of its args.
        """
        names = [spec.name for spec in specs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise RecipeError(
                f"rewards: the name {', '.join(twice)} is used more than once, and metrics go by it: set rewards.name"
            )
        return RewardSet([_load(spec) for spec in specs])

    def check(self, source: PromptSource) -> None:
        """Raise `RecipeError` unless the prompts of ``source`` carry every column that a function needs."""
        for reward in self._functions:
            spec = reward.spec
            clash = sorted(set(spec.args) & source.columns)
            if clash:
                raise RecipeError(
                    f"reward {spec.name}: {', '.join(clash)} is both a dataset column and a key of [rewards.args]: "
                    "rename one"
                )
            missing = sorted(reward.required - source.columns - set(spec.args))
            if missing:
                close = difflib.get_close_matches(missing[0], source.columns, n=1)
                nearest = f" (nearest to {missing[0]}: {close[0]})" if close else ""
                raise RecipeError(
                    f"reward {spec.name} ({spec.function}) needs {', '.join(missing)}, but the dataset's columns are "
                    f"{', '.join(sorted(source.columns)) or 'none'}{nearest}: add the column, or set it in "
                    "[rewards.args]"
                )
            if spec.function in BUILTIN_REWARDS:
                _try_on_nothing(reward)

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
    ) -> ScoredBatch:
        """Score completions; entry i of all three belongs together.

        Raises:
            RewardError: when a function raises, or returns anything but one finite number a sample.
        """
        batch = _Batch(prompts=prompts, completions=completions, completion_ids=completion_ids)
        if not prompts:
            nothing = np.zeros(0, dtype=np.float64)
            return ScoredBatch(scores=dict.fromkeys(self.names, nothing), total=nothing)
        results = _call_all(self._functions, batch)
        scores: dict[str, Float64[np.ndarray, " n"]] = {}
        total = np.zeros(len(prompts), dtype=np.float64)
        for reward, result in zip(self._functions, results, strict=True):
            if isinstance(result, Exception):
                raise _call_error(reward, batch, result) from result
            scores[reward.spec.name] = _checked_scores(reward, batch, result)
            total += reward.spec.weight * scores[reward.spec.name]
        return ScoredBatch(scores=scores, total=total)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    prompts: Sequence[Prompt]
    completions: Sequence[str]
    completion_ids: Sequence[Sequence[int]]

    def part(self, start: int, stop: int) -> _Batch:
        return _Batch(
            prompts=self.prompts[start:stop],
            completions=self.completions[start:stop],
            completion_ids=self.completion_ids[start:stop],
        )

    def describe(self, number: int) -> str:
        return (
            f"sample {number} (prompt {_excerpt(self.prompts[number].text)}, "
            f"completion {_excerpt(self.completions[number])})"
        )


def _call_all(functions: Sequence[RewardFunction], batch: _Batch) -> list[Any]:
    """Return each function's result, or the exception that it raised; async functions run together at the end."""
    results = [_call(reward, batch) for reward in functions]
    waiting = [number for number, result in enumerate(results) if inspect.isawaitable(result)]
    if waiting:
        finished = asyncio.run(_gather([results[number] for number in waiting]))
        for number, result in zip(waiting, finished, strict=True):
            results[number] = result
    return results


def _call(reward: RewardFunction, batch: _Batch) -> Any:
    arguments = reward.arguments(batch.prompts, batch.completions, batch.completion_ids)
    try:
        return reward.function(**arguments)
    except Exception as error:  # noqa: BLE001 (the user's function: a seam)
        return error


async def _gather(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
    return await asyncio.gather(*awaitables, return_exceptions=True)


def _call_error(reward: RewardFunction, batch: _Batch, error: Exception) -> RewardError:
    number = _failing_sample(reward, batch)
    where = (
        f"no single sample (it raises on the batch of {len(batch.prompts)} only)"
        if number is None
        else batch.describe(number)
    )
    return RewardError(
        f"reward {reward.spec.name} ({reward.spec.function}) raised {type(error).__name__}: {error}; on {where}. "
        "Make the function return a score for such a completion (0.0 if it is worth nothing), or correct the dataset"
    )


def _failing_sample(reward: RewardFunction, batch: _Batch) -> int | None:
    """Find a sample on which the function raises by calling it on ever smaller parts of the batch."""
    start, stop = 0, len(batch.prompts)
    while stop - start > 1:
        middle = (start + stop) // 2
        for part in ((start, middle), (middle, stop)):
            if isinstance(_call_all([reward], batch.part(*part))[0], Exception):
                start, stop = part
                break
        else:
            return None
    return start


def _checked_scores(
    reward: RewardFunction, batch: _Batch, result: Any
) -> Float64[np.ndarray, " n"]:
    who = f"reward {reward.spec.name} ({reward.spec.function})"
    values = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(values, list | tuple):
        raise RewardError(
            f"{who} returned {_excerpt(result)} ({type(result).__name__}), expected a list of "
            f"{len(batch.prompts)} numbers. {_RULE}"
        )
    if len(values) != len(batch.prompts):
        raise RewardError(
            f"{who} returned {len(values)} scores for {len(batch.prompts)} completions. {_RULE}"
        )
    for number, value in enumerate(values):
        if not isinstance(value, Real | np.bool_) or not np.isfinite(float(value)):
            raise RewardError(
                f"{who} returned {_excerpt(value)} for {batch.describe(number)}. {_RULE}"
            )
    return np.array([float(value) for value in values], dtype=np.float64)


def _load(spec: RewardSpec) -> RewardFunction:
    function = _find(spec)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"reward {spec.function}: its signature cannot be read: {error}"
        ) from error
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    accepted = frozenset(p.name for p in by_name)
    takes_everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if "completions" not in accepted and not takes_everything:
        raise RecipeError(
            f"reward {spec.function}({', '.join(map(str, parameters))}) takes no argument named completions: write "
            "it as def f(completions, *, <dataset columns>) -> list[float]"
        )
    unknown = sorted(set(spec.args) - accepted)
    if unknown and not takes_everything:
        raise RecipeError(
            f"reward {spec.name}: [rewards.args] sets {', '.join(unknown)}, but {spec.function} takes "
            f"{', '.join(sorted(accepted))}: rename or remove it"
        )
    return RewardFunction(
        spec=spec,
        function=function,
        required=frozenset(p.name for p in by_name if p.default is p.empty) - _OWN_NAMES,
        accepted=accepted,
        takes_everything=takes_everything,
    )


def _find(spec: RewardSpec) -> Callable[..., Any]:
    if spec.function in BUILTIN_REWARDS:
        return BUILTIN_REWARDS[spec.function]
    place, colon, name = spec.function.rpartition(":")
    if not colon or not place:
        close = difflib.get_close_matches(spec.function, BUILTIN_REWARDS, n=1)
        nearest = f" (nearest: {close[0]})" if close else ""
        raise RecipeError(
            f"rewards.function {spec.function!r} is none of {', '.join(BUILTIN_REWARDS)}{nearest}, nor of the form "
            "module:function or file.py:function"
        )
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    function = getattr(module, name, None)
    if not callable(function) or isinstance(function, type):
        known = [n for n, value in vars(module).items() if inspect.isfunction(value)]
        problem = (
            "has no function"
            if function is None
            else f"has a {type(function).__name__}, not a function,"
        )
        raise RecipeError(
            f"rewards.function {spec.function!r}: {place} {problem} {name!r}; its functions are "
            f"{', '.join(known) or 'none'}"
        )
    return function


def _import_module(name: str) -> ModuleType:
    # Importing runs the user's code: whatever it raises is reported as its failure.
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise RecipeError(
            f"rewards.function: module {name!r} cannot be imported: {type(error).__name__}: {error}. Install it, or "
            "name a file as path/to/file.py:function"
        ) from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise RecipeError(
            f"rewards.function: file {path} does not exist (relative paths start at the recipe's folder)"
        )
    digest = hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:8]
    name = f"moe_replay_reward_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    # Dataclasses and pickles of the file look their module up there.
    sys.modules[name] = module
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise RecipeError(
            f"rewards.function: {path} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    return module


def _try_on_nothing(reward: RewardFunction) -> None:
    """Call a built-in on an empty batch, so that a wrong argument, such as a broken regex, shows at the start."""
    try:
        reward.function(**reward.arguments([], [], []))
    except Exception as error:
        raise RecipeError(
            f"reward {reward.spec.name}: [rewards.args] {dict(reward.spec.args)!r} is refused: "
            f"{type(error).__name__}: {error}"
        ) from error


def _excerpt(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
