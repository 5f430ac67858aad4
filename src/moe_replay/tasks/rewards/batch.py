"""A batch of completions on its way to reward functions: the part that each scores, as JSON."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_replay.errors import RewardError
from moe_replay.tasks.chat_messages import excerpt
from moe_replay.tasks.encoding import Prompt
from moe_replay.tasks.rewards.functions import Signature
from moe_replay.tasks.rewards.wire import encode_value

Rows = Sequence[int]
"""Indices of completions in a batch, in increasing order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Completions with their prompts; entry i of all belongs together."""

    prompts: Sequence[Prompt]
    """Of each completion; the same object for those of one prompt."""
    completions: Sequence[str]
    """What rewards see as text."""
    completion_ids: Sequence[Sequence[int] | np.ndarray]
    """Sampled tokens."""
    state: tuple[int, int]
    """Finished steps, and those of the run."""

    @property
    def rows(self) -> Rows:
        """All of them."""
        return range(len(self.prompts))

    def of_datasets(self, names: Collection[str]) -> Rows:
        """Return the completions of datasets by their names; all of them without any name."""
        if not names:
            return self.rows
        return [row for row in self.rows if self.prompts[row].dataset in names]

    def parts(self, rows: Rows, count: int) -> list[Rows]:
        """Cut completions into at most ``count`` parts that hold whole prompts, about equally many.

        Example: 3 prompts of 2 completions in 2 parts are ``[0, 1, 2, 3]`` and ``[4, 5]``.
        """
        starts = [
            place
            for place, row in enumerate(rows)
            if place == 0 or self.prompts[row] is not self.prompts[rows[place - 1]]
        ]
        count = min(count, len(starts))
        cuts = [starts[-(-number * len(starts) // count)] for number in range(count)]
        ends = [*cuts[1:], len(rows)]
        return [rows[start:end] for start, end in zip(cuts, ends, strict=True)]

    def describe(self, row: int) -> str:
        """Return prompt and completion, shortened."""
        return (
            f"sample {row} (prompt {excerpt(self.prompts[row].text)}, "
            f"completion {excerpt(self.completions[row])})"
        )

    def to_plain(self, asked: Mapping[int, tuple[Signature, Rows]]) -> tuple[dict[str, Any], bytes]:
        """Return a request as JSON and bytes: each prompt once, with what some function takes.

        ``asked``: function, by its index in the process -> its signature, and the completions that
        it scores. Completions that none of them scores are left out.
        """
        signatures = [signature for signature, _ in asked.values()]
        sent = sorted({row for _, rows in asked.values() for row in rows})
        place = {row: number for number, row in enumerate(sent)}
        distinct = {id(self.prompts[row]): self.prompts[row] for row in sent}
        index_of = {identity: index for index, identity in enumerate(distinct)}
        with_ids = any(signature.takes("completion_ids") for signature in signatures)
        ids = [self.completion_ids[row] for row in sent] if with_ids else []
        plain = {
            "prompts": [prompt.text for prompt in distinct.values()],
            "datasets": [prompt.dataset for prompt in distinct.values()],
            "rows": [_columns(prompt, signatures) for prompt in distinct.values()],
            "prompt_of": [index_of[id(self.prompts[row])] for row in sent],
            "completions": [self.completions[row] for row in sent],
            "lengths": [len(each) for each in ids],
            "state": list(self.state),
            "asked": {
                str(number): [place[row] for row in rows]
                for number, (_, rows) in asked.items()
                if len(rows) < len(sent)
            },
        }
        return plain, b"".join(np.asarray(each, dtype="<i4").tobytes() for each in ids)


def _columns(prompt: Prompt, signatures: Sequence[Signature]) -> dict[str, Any]:
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
