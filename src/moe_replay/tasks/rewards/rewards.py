"""The reward functions of a run, called by keyword and checked for one number a completion.

A reward function is called by keyword with lists that hold one entry per completion::

    def my_reward(completions, *, prompts, completion_ids, answer, tolerance=0.1, **columns) ->
    list[float | None]: ...

``completions`` and ``prompts`` are texts, ``completion_ids`` token ids, every other name is a
dataset column or a key of ``[rewards.args]``; a function that names ``trainer_state`` or
``log_metric`` gets these too. Only names that the function takes are passed. It may
be ``async``; all async functions of a batch run concurrently. None means no opinion on a
completion.

All functions run in one separate process (`client`) for the whole run: they cannot affect the
trainer, and a function that hangs or ends its process is named.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64

from moe_replay.errors import RecipeError, RewardError, nearest_of
from moe_replay.recipe.sections.run import RewardSection
from moe_replay.tasks.chat_messages import excerpt
from moe_replay.tasks.encoding import Prompt
from moe_replay.tasks.prompts import PromptSource
from moe_replay.tasks.rewards.builtin import BUILTIN_REWARDS
from moe_replay.tasks.rewards.client import Failure, RewardProcess, Scores
from moe_replay.tasks.rewards.functions import OWN_NAMES, Signature, load_function
from moe_replay.tasks.rewards.wire import encode_value

_SEARCH_S = 60.0
"""Maximum search time for the completion that a function fails on; no call starts after that."""
_ADVICE = {
    "raised": "Return a score for such a completion (0.0 if it is wrong, None for no opinion), or "
    "correct the dataset",
    "wrong": "A reward function returns one finite number for each completion, or None for no opinion",
    "late": "Raise timeout_s in its [[rewards]] table if it needs more time; otherwise check what it waits for",
    "crashed": "A reward function must return scores or raise; ending the process (os._exit, a crash in native code, too "
    "much memory) ends the run",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredBatch:
    """The rewards of a batch of n completions."""

    scores: Mapping[str, Float64[np.ndarray, " n"]]
    """Reward function -> ``[n]`` unweighted scores; NaN for no opinion."""
    total: Float64[np.ndarray, " n"]
    """``[n]`` weighted sums over the functions that have an opinion; NaN if none has."""
    failed: Mapping[str, Bool[np.ndarray, " n"]] = field(default_factory=dict)
    """Reward function whose failures are tolerated -> ``[n]`` where it failed."""
    notes: Sequence[str] = ()
    """How each function failed that did."""
    logged: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    """Name -> sum and count of what functions have logged."""


class RewardSet:
    """The reward functions of a run and the process that runs them.

    Close it, or use it in ``with``.
    """

    def __init__(
        self,
        specs: Sequence[RewardSection],
        signatures: Sequence[Signature],
        process: RewardProcess,
    ) -> None:
        self._specs = tuple(specs)
        self._signatures = tuple(signatures)
        self._process = process

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the functions, in the order of the recipe."""
        return tuple(spec.name for spec in self._specs)

    def takes(self, name: str) -> bool:
        """Return whether any function takes the dataset column ``name``."""
        return any(signature.takes(name) for signature in self._signatures)

    @staticmethod
    def load(specs: Sequence[RewardSection], *, folders: Sequence[str] = ()) -> RewardSet:
        """Find every function; the reward process imports modules, from ``folders`` first.

        With built-ins alone, the first call of `score` starts the process.

        Raises:
            RecipeError: one cannot be found, does not take ``completions``, or does not take one of
                its args.
        """
        process = RewardProcess(
            [
                {
                    "function": spec.function,
                    "args": encode_value(spec.args),
                    "timeout_s": spec.timeout_s,
                }
                for spec in specs
            ],
            folders,
        )
        if all(spec.function in BUILTIN_REWARDS for spec in specs):
            signatures = [load_function(spec.function, spec.args)[1] for spec in specs]
            return RewardSet(specs, signatures, process)
        loaded = process.load()
        for spec, result in zip(specs, loaded, strict=True):
            if isinstance(result, Failure) and result.kind != "stopped":
                process.close()
                raise _load_error(spec, result) from _cause(result)
        return RewardSet(specs, [r for r in loaded if isinstance(r, Signature)], process)

    def close(self) -> None:
        """End the reward process."""
        self._process.close()

    def __enter__(self) -> RewardSet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def needs(self) -> Iterator[tuple[RewardSection, str]]:
        """Yield each function with each dataset column that it requires."""
        for spec, signature in zip(self._specs, self._signatures, strict=True):
            for name in signature.required:
                if name not in spec.args:
                    yield spec, name

    def check(self, source: PromptSource) -> None:
        """Raise `RecipeError` unless ``source`` has every column that a function requires."""
        for spec, signature in zip(self._specs, self._signatures, strict=True):
            _check_columns(spec, signature, source)
            if spec.function in BUILTIN_REWARDS:
                _try_on_nothing(spec, signature)

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int] | np.ndarray],
        *,
        state: tuple[int, int] = (0, 0),
    ) -> ScoredBatch:
        """Score completions; entry i of all three belongs together.

        ``state`` is what functions see as ``trainer_state``: finished steps, and those of the run.

        Raises:
            RewardError: a function whose ``on_failure`` is ``stop`` raises, hangs, ends its
                process, or does not return one finite number or None a completion.
        """
        batch = _Batch(
            prompts=prompts, completions=completions, completion_ids=completion_ids, state=state
        )
        tolerated = [n for n, spec in enumerate(self._specs) if spec.on_failure != "stop"]
        if not self._specs:
            # An environment scores alone.
            return ScoredBatch(scores={}, total=np.full(len(prompts), np.nan))
        if not prompts:
            nothing = np.zeros(0, dtype=np.float64)
            none = {self._specs[n].name: np.zeros(0, dtype=bool) for n in tolerated}
            return ScoredBatch(
                scores=dict.fromkeys(self.names, nothing), total=nothing, failed=none
            )
        outcomes = self._call(batch, range(len(self._specs)))
        kinds = {n: o.kind for n, o in enumerate(outcomes) if isinstance(o, Failure)}
        if any(kinds.get(n, "stopped") != "stopped" for n in tolerated):
            for number in [n for n, kind in kinds.items() if kind == "stopped"]:
                # It only ran beside one whose failure is tolerated.
                (outcomes[number],) = self._call(batch, [number])
        self._refuse_failures(
            batch, [None if n in tolerated else o for n, o in enumerate(outcomes)]
        )
        failed, notes = {}, []
        for number in tolerated:
            spec, outcome = self._specs[number], outcomes[number]
            gone = np.zeros(len(prompts), dtype=bool)
            if isinstance(outcome, Failure):
                notes.append(f"reward {spec.name} ({spec.function}) {outcome.text}")
                outcomes[number], gone = self._score_others(number, batch, outcome)
            failed[spec.name] = gone
        scored = _weighted(self._specs, [o for o in outcomes if not isinstance(o, Failure)])
        total = scored.total.copy()
        for number in tolerated:
            if self._specs[number].on_failure == "drop":
                # The other functions' scores alone would be too low a reward.
                total[failed[self._specs[number].name]] = np.nan
        return replace(
            scored, total=total, failed=failed, notes=notes, logged=self._process.take_logged()
        )

    def _refuse_failures(self, batch: _Batch, outcomes: Sequence[Scores | Failure | None]) -> None:
        """Raise the `RewardError` of the function that caused the failures of some."""
        failed = [n for n, outcome in enumerate(outcomes) if isinstance(outcome, Failure)]
        # A function that was only stopped is not the cause.
        for number in sorted(failed, key=lambda n: getattr(outcomes[n], "kind", "") == "stopped"):
            failure = outcomes[number]
            assert isinstance(failure, Failure)
            raise self._error(number, batch, failure) from _cause(failure)

    def _score_others(
        self, number: int, batch: _Batch, failure: Failure
    ) -> tuple[Scores, Bool[np.ndarray, " n"]]:
        """Return a function's scores where it does not fail, and where it does.

        It is called on parts of the batch, for at most a minute; what is left then counts as
        failed, and so does all of a batch on which it is late.
        """
        size = len(batch.prompts)
        score = 0.0 if self._specs[number].on_failure == "zero" else None
        scores: list[float | None] = [score] * size
        failed = np.ones(size, dtype=bool)
        parts = _halves(0, size) if failure.kind != "late" else []
        until = time.monotonic() + _SEARCH_S
        while parts and time.monotonic() < until:
            start, stop = parts.pop()
            (outcome,) = self._call(batch.part(start, stop), [number])
            if not isinstance(outcome, Failure):
                scores[start:stop] = outcome
                failed[start:stop] = False
            elif outcome.kind != "late":
                parts += _halves(start, stop)
        return scores, failed

    def _call(self, batch: _Batch, functions: Sequence[int]) -> list[Scores | Failure]:
        request, blob = batch.to_plain([self._signatures[number] for number in functions])
        return self._process.score(request, blob, functions)

    def _error(self, number: int, batch: _Batch, failure: Failure) -> RewardError:
        spec, sample = self._specs[number], failure.sample
        where = ""
        if sample is not None:
            where = f" for {batch.describe(sample)}"
        elif failure.kind in ("raised", "crashed"):
            sample = self._failing_sample(number, batch)
            where = (
                f"; on no single sample (it fails only on the batch of {len(batch.prompts)}, or not every time)"
                if sample is None
                else f"; on {batch.describe(sample)}"
            )
        return RewardError(
            f"reward {spec.name} ({spec.function}) {failure.text}{where}. {_ADVICE.get(failure.kind, '')}"
        )

    def _failing_sample(self, number: int, batch: _Batch) -> int | None:
        """Find a sample on which a function fails by bisecting the batch."""
        start, stop = 0, len(batch.prompts)
        until = time.monotonic() + _SEARCH_S
        while stop - start > 1:
            middle = (start + stop) // 2
            for part in ((start, middle), (middle, stop)):
                if time.monotonic() > until:
                    return None
                (outcome,) = self._call(batch.part(*part), [number])
                if isinstance(outcome, Failure):
                    start, stop = part
                    break
            else:
                return None
        return start


class _RewardTraceback(Exception):
    """The traceback of a reward function in its own process, as text."""

    def __str__(self) -> str:
        return f"in the reward process:\n{self.args[0]}"


def _cause(failure: Failure) -> Exception | None:
    return _RewardTraceback(failure.trace) if failure.trace else None


def _load_error(spec: RewardSection, failure: Failure) -> RecipeError:
    if failure.kind == "refused":
        return RecipeError(failure.text)
    return RecipeError(
        f"rewards.function {spec.function!r}: its import {failure.text}. {_ADVICE.get(failure.kind, '')}"
    )


def _halves(start: int, stop: int) -> list[tuple[int, int]]:
    """Return the halves of a range; none of a single one."""
    middle = (start + stop) // 2
    return [(start, middle), (middle, stop)] if stop - start > 1 else []


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    prompts: Sequence[Prompt]
    completions: Sequence[str]
    completion_ids: Sequence[Sequence[int] | np.ndarray]
    state: tuple[int, int]

    def part(self, start: int, stop: int) -> _Batch:
        return replace(
            self,
            prompts=self.prompts[start:stop],
            completions=self.completions[start:stop],
            completion_ids=self.completion_ids[start:stop],
        )

    def describe(self, number: int) -> str:
        return (
            f"sample {number} (prompt {excerpt(self.prompts[number].text)}, "
            f"completion {excerpt(self.completions[number])})"
        )

    def to_plain(self, signatures: Sequence[Signature]) -> tuple[dict[str, Any], bytes]:
        """Return the batch as JSON and bytes: each prompt once, with what some function takes."""
        distinct = {id(prompt): prompt for prompt in self.prompts}
        index_of = {identity: index for index, identity in enumerate(distinct)}
        ids = self.completion_ids if any(s.takes("completion_ids") for s in signatures) else []
        plain = {
            "prompts": [prompt.text for prompt in distinct.values()],
            "rows": [_row(prompt, signatures) for prompt in distinct.values()],
            "prompt_of": [index_of[id(prompt)] for prompt in self.prompts],
            "completions": list(self.completions),
            "lengths": [len(each) for each in ids],
            "state": list(self.state),
        }
        return plain, b"".join(np.asarray(each, dtype="<i4").tobytes() for each in ids)


def _row(prompt: Prompt, signatures: Sequence[Signature]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, value in prompt.columns.items():
        if any(signature.takes(name) for signature in signatures):
            try:
                row[name] = encode_value(value)
            except TypeError as error:
                raise RewardError(
                    f"column {name} of prompt {excerpt(prompt.text)} holds {error}, which cannot be sent to reward "
                    "functions in their own process: expected numbers, strings, bytes, times, arrays, "
                    "and lists, tuples, sets and dicts of them. Convert the column, or let no reward function take it"
                ) from error
            except RecursionError as error:
                raise RewardError(
                    f"column {name} of prompt {excerpt(prompt.text)} is nested too deeply for a reward function"
                ) from error
    return row


def _weighted(specs: Sequence[RewardSection], outcomes: Sequence[Scores]) -> ScoredBatch:
    scores = {
        spec.name: np.array(outcome, dtype=np.float64)
        for spec, outcome in zip(specs, outcomes, strict=True)
    }
    table = np.stack(list(scores.values()))
    weights = np.array([[spec.weight] for spec in specs])
    with np.errstate(over="ignore"):
        total = np.where(np.isnan(table).all(axis=0), np.nan, np.nansum(table * weights, axis=0))
    if np.isinf(total).any():
        raise RewardError(
            f"the weighted sum of the rewards {', '.join(scores)} is infinite for {int(np.isinf(total).sum())} of "
            f"{len(total)} completions: scale the scores, or lower rewards.weight"
        )
    return ScoredBatch(scores=scores, total=total)


def _check_columns(spec: RewardSection, signature: Signature, source: PromptSource) -> None:
    clash = sorted(set(spec.args) & source.columns)
    if clash:
        raise RecipeError(
            f"reward {spec.name}: {', '.join(clash)} is both a dataset column and a key of [rewards.args]: rename one"
        )
    missing = sorted(set(signature.required) - source.columns - set(spec.args))
    if missing:
        nearest = nearest_of(missing[0], source.columns)
        raise RecipeError(
            f"reward {spec.name} ({spec.function}) needs {', '.join(missing)}, but the dataset's columns are "
            f"{', '.join(sorted(source.columns)) or 'none'}{nearest}: add the column, or set it in [rewards.args]"
        )


def _try_on_nothing(spec: RewardSection, signature: Signature) -> None:
    """Call a built-in on an empty batch, so that a bad argument fails at the start."""
    names = {*signature.required, *OWN_NAMES}
    arguments = {name: [] for name in names if signature.takes(name)} | spec.args
    try:
        BUILTIN_REWARDS[spec.function](**arguments)
    except Exception as error:
        raise RecipeError(
            f"reward {spec.name}: [rewards.args] {spec.args!r} is rejected: {type(error).__name__}: {error}"
        ) from error
