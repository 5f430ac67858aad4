"""The reward functions of a run, called by keyword and checked for one number a completion.

A reward function is called by keyword with lists that hold one entry per completion::

    def my_reward(completions, *, prompts, completion_ids, answer, tolerance=0.1, **columns) ->
    list[float | None]: ...

``completions`` and ``prompts`` are texts, ``completion_ids`` token ids, every other name is a
dataset column or a key of ``[rewards.args]``; a function that names ``trainer_state`` or
``log_metric`` gets these too. Only names that the function takes are passed. It may
be ``async``; all async functions of a batch run concurrently. None means no opinion on a
completion.

All functions run in one separate process (`client`) for the whole run, and one with ``num_workers``
in several (`pool`): they cannot affect the trainer, and a function that hangs or ends its process
is named.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Bool, Float64

from moe_replay.errors import RecipeError, RewardError
from moe_replay.recipe.sections.run import RewardSection
from moe_replay.tasks.encoding import Prompt
from moe_replay.tasks.prompts import PromptSource
from moe_replay.tasks.rewards.batch import Batch, Rows
from moe_replay.tasks.rewards.builtin import BUILTIN_REWARDS
from moe_replay.tasks.rewards.checks import check_columns, is_asked, try_on_nothing
from moe_replay.tasks.rewards.client import Answer, Failure, RewardProcess, Scores
from moe_replay.tasks.rewards.functions import Signature, load_function
from moe_replay.tasks.rewards.pool import RewardPool, wait_until
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Function:
    """A reward function of a run."""

    spec: RewardSection
    signature: Signature
    pool: RewardPool | None
    """Its processes; None where it shares that of the others."""


Outcome = tuple[Rows, Answer | Failure]
"""Completions, and what came of a call on them."""


class RewardSet:
    """The reward functions of a run and the processes that run them.

    Close it, or use it in ``with``.
    """

    def __init__(self, functions: Sequence[_Function], process: RewardProcess) -> None:
        self._functions = tuple(functions)
        self._process = process
        self._logged: dict[str, tuple[float, int]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the functions, in the order of the recipe."""
        return tuple(each.spec.name for each in self._functions)

    def takes(self, name: str) -> bool:
        """Return whether any function takes the dataset column ``name``."""
        return any(each.signature.takes(name) for each in self._functions)

    @staticmethod
    def load(specs: Sequence[RewardSection], *, folders: Sequence[str] = ()) -> RewardSet:
        """Find every function; the reward process imports modules, from ``folders`` first.

        With built-ins alone, the first call of `score` starts the process.

        Raises:
            RecipeError: one cannot be found, does not take ``completions``, does not take one of
                its args, or is async and asks for processes of its own.
        """
        plain = [
            {"function": s.function, "args": encode_value(s.args), "timeout_s": s.timeout_s}
            for s in specs
        ]
        process = RewardProcess(plain, folders)
        if all(spec.function in BUILTIN_REWARDS for spec in specs):
            signatures = [load_function(spec.function, spec.args)[1] for spec in specs]
        else:
            loaded = process.load()
            for spec, result in zip(specs, loaded, strict=True):
                if isinstance(result, Failure) and result.kind != "stopped":
                    process.close()
                    raise _load_error(spec, result) from result.cause()
            signatures = [result for result in loaded if isinstance(result, Signature)]
        for spec, signature in zip(specs, signatures, strict=True):
            if spec.num_workers > 1 and signature.is_async:
                process.close()
                raise RecipeError(
                    f"reward {spec.name}: num_workers = {spec.num_workers} with an async function, whose calls all "
                    "share one event loop and its clients: remove num_workers, or write it as a plain def"
                )
        return RewardSet(
            [
                _Function(
                    spec=spec,
                    signature=signature,
                    pool=RewardPool(each, spec.num_workers, folders)
                    if spec.num_workers > 1
                    else None,
                )
                for spec, signature, each in zip(specs, signatures, plain, strict=True)
            ],
            process,
        )

    def close(self) -> None:
        """End the processes."""
        self._process.close()
        for pool in self._pools():
            pool.close()

    def __enter__(self) -> RewardSet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _pools(self) -> list[RewardPool]:
        return [each.pool for each in self._functions if each.pool is not None]

    def needs(self, dataset: str = "") -> Iterator[tuple[RewardSection, str]]:
        """Yield each function that scores a dataset, with each column that it requires."""
        for each in self._functions:
            if is_asked(each.spec, dataset):
                for name in each.signature.required:
                    if name not in each.spec.args:
                        yield each.spec, name

    def check(self, source: PromptSource, dataset: str = "") -> None:
        """Raise `RecipeError` unless ``source`` has every column that a function requires."""
        for each in self._functions:
            if is_asked(each.spec, dataset):
                check_columns(each.spec, each.signature, source)
            if each.spec.function in BUILTIN_REWARDS:
                try_on_nothing(each.spec, each.signature)

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
        batch = Batch(
            prompts=prompts, completions=completions, completion_ids=completion_ids, state=state
        )
        self._logged = {}
        if not self._functions:
            # An environment scores alone.
            return ScoredBatch(scores={}, total=np.full(len(prompts), np.nan))
        outcomes = self._call_all(batch)
        tolerated = [n for n, f in enumerate(self._functions) if f.spec.on_failure != "stop"]
        self._refuse_failures(
            batch, {n: each for n, each in outcomes.items() if n not in tolerated}
        )
        scored, failed, notes = [], {}, []
        for number, function in enumerate(self._functions):
            values: list[float | None] = [None] * len(prompts)
            gone = np.zeros(len(prompts), dtype=bool)
            for rows, outcome in outcomes[number]:
                if isinstance(outcome, Failure):
                    spec = function.spec
                    notes.append(f"reward {spec.name} ({spec.function}) {outcome.text}")
                    self._score_others(number, batch, rows, outcome, values, gone)
                else:
                    for row, score in zip(rows, outcome.scores, strict=True):
                        values[row] = score
            scored.append(values)
            if number in tolerated:
                failed[function.spec.name] = gone
        batch_scores = _weighted([each.spec for each in self._functions], scored)
        total = batch_scores.total.copy()
        for number in tolerated:
            if self._functions[number].spec.on_failure == "drop":
                # The other functions' scores alone would be too low a reward.
                total[failed[self._functions[number].spec.name]] = np.nan
        return replace(batch_scores, total=total, failed=failed, notes=notes, logged=self._logged)

    def _call_all(self, batch: Batch) -> dict[int, list[Outcome]]:
        """Call every function on the completions of its datasets; pools work beside the others.

        The failure of one that stops the run ends what is still running in pools, unanswered.
        """
        asked = {n: batch.of_datasets(each.spec.datasets) for n, each in enumerate(self._functions)}
        try:
            waiting = {
                n: each.pool.start(batch, asked[n], each.signature)
                for n, each in enumerate(self._functions)
                if each.pool is not None and len(asked[n])
            }
            shared = {n: rows for n, rows in asked.items() if self._functions[n].pool is None}
            outcomes = {n: [each] for n, each in self._call(batch, shared).items()}
            if not any(self._stops(number, each) for number, ((_, each),) in outcomes.items()):
                futures = {f: n for n, parts in waiting.items() for _, f in parts}
                wait_until(self._stops, futures)
            for number, parts in waiting.items():
                outcomes[number] = [(rows, each.result()) for rows, each in parts if each.done()]
                self._note(outcome for _, outcome in outcomes[number])
            for pool in self._pools():
                pool.interrupt()
        except BaseException:
            # Their late answers would be taken for answers to the next batch.
            for pool in self._pools():
                pool.interrupt()
            raise
        return {number: outcomes.get(number, []) for number in asked}

    def _stops(self, number: int, outcome: Answer | Failure) -> bool:
        return isinstance(outcome, Failure) and self._functions[number].spec.on_failure == "stop"

    def _call(self, batch: Batch, asked: Mapping[int, Rows]) -> dict[int, Outcome]:
        """Call functions that share a process, on completions of their own; none on no completion.

        One that is only stopped beside another whose failure is tolerated is called again.
        """
        asked = {number: rows for number, rows in asked.items() if len(rows)}
        if not asked:
            return {}
        signatures = {n: (self._functions[n].signature, rows) for n, rows in asked.items()}
        request, blob = batch.to_plain(signatures)
        answers = dict(zip(asked, self._process.score(request, blob, list(asked)), strict=True))
        self._note(answers.values())
        kinds = {n: each.kind for n, each in answers.items() if isinstance(each, Failure)}
        if any(
            kind != "stopped" and self._functions[n].spec.on_failure != "stop"
            for n, kind in kinds.items()
        ):
            for number in [n for n, kind in kinds.items() if kind == "stopped"]:
                answers[number] = self._call(batch, {number: asked[number]})[number][1]
        return {number: (asked[number], answers[number]) for number in asked}

    def _call_one(self, number: int, batch: Batch, rows: Rows) -> Answer | Failure:
        """Call one function on completions, in a process of its own where it has some."""
        function = self._functions[number]
        if function.pool is None:
            return self._call(batch, {number: rows})[number][1]
        outcome = function.pool.score(batch, rows, function.signature)
        self._note([outcome])
        return outcome

    def _note(self, outcomes: Iterable[Answer | Failure]) -> None:
        """Add up what calls have logged, in an order that does not depend on time."""
        for outcome in outcomes:
            if isinstance(outcome, Answer):
                for name, (total, count) in outcome.logged.items():
                    before = self._logged.get(name, (0.0, 0))
                    self._logged[name] = (before[0] + total, before[1] + int(count))

    def _refuse_failures(self, batch: Batch, outcomes: Mapping[int, Sequence[Outcome]]) -> None:
        """Raise the `RewardError` of the function that caused the failures of some."""
        failed = [
            (number, rows, outcome)
            for number, each in outcomes.items()
            for rows, outcome in each
            if isinstance(outcome, Failure)
        ]
        # A function that was only stopped is not the cause.
        for number, rows, failure in sorted(failed, key=lambda each: each[2].kind == "stopped"):
            raise self._error(number, batch, rows, failure) from failure.cause()

    def _score_others(
        self,
        number: int,
        batch: Batch,
        rows: Rows,
        failure: Failure,
        scores: list[float | None],
        failed: Bool[np.ndarray, " n"],
    ) -> None:
        """Enter a function's scores where it does not fail, and where it does.

        It is called on parts of ``rows``, for at most a minute; what is left then counts as failed,
        and so do all completions of a call that is late.
        """
        for row in rows:
            scores[row] = 0.0 if self._functions[number].spec.on_failure == "zero" else None
            failed[row] = True
        parts = _halves(rows) if failure.kind != "late" else []
        until = time.monotonic() + _SEARCH_S
        while parts and time.monotonic() < until:
            part = parts.pop()
            outcome = self._call_one(number, batch, part)
            if not isinstance(outcome, Failure):
                for row, score in zip(part, outcome.scores, strict=True):
                    scores[row], failed[row] = score, False
            elif outcome.kind != "late":
                parts += _halves(part)

    def _error(self, number: int, batch: Batch, rows: Rows, failure: Failure) -> RewardError:
        spec = self._functions[number].spec
        where = ""
        if failure.sample is not None:
            where = f" for {batch.describe(rows[failure.sample])}"
        elif failure.kind in ("raised", "crashed"):
            row = self._failing_row(number, batch, rows)
            where = (
                f"; on no single sample (it fails only on the batch of {len(rows)}, or not every time)"
                if row is None
                else f"; on {batch.describe(row)}"
            )
        return RewardError(
            f"reward {spec.name} ({spec.function}) {failure.text}{where}. {_ADVICE.get(failure.kind, '')}"
        )

    def _failing_row(self, number: int, batch: Batch, rows: Rows) -> int | None:
        """Find a completion on which a function fails by bisecting the batch."""
        until = time.monotonic() + _SEARCH_S
        while len(rows) > 1:
            for part in _halves(rows):
                if time.monotonic() > until:
                    return None
                if isinstance(self._call_one(number, batch, part), Failure):
                    rows = part
                    break
            else:
                return None
        return rows[0]


def _load_error(spec: RewardSection, failure: Failure) -> RecipeError:
    if failure.kind == "refused":
        return RecipeError(failure.text)
    return RecipeError(
        f"rewards.function {spec.function!r}: its import {failure.text}. {_ADVICE.get(failure.kind, '')}"
    )


def _halves(rows: Rows) -> list[Rows]:
    """Return the halves of some completions; none of a single one."""
    middle = len(rows) // 2
    return [rows[:middle], rows[middle:]] if len(rows) > 1 else []


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
