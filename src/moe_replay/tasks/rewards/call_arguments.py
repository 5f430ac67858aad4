"""A batch as the reward process reads it from a request, and the arguments of each call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moe_replay.tasks.rewards.functions import NAMED_ONLY, MetricLog, Signature, TrainerState
from moe_replay.tasks.rewards.wire import decode_value, unpack_ids


class CallBatch:
    """Completions of a request, or those of them that one function scores.

    Each call gets its own copies.
    """

    def __init__(self, request: Mapping[str, Any], blob: bytes) -> None:
        self._request = request
        self._blob = blob
        self._columns = [
            {name: decode_value(value) for name, value in row.items()} for row in request["rows"]
        ]
        self._chosen: Sequence[int] = range(len(request["completions"]))

    @property
    def size(self) -> int:
        """Number of completions."""
        return len(self._chosen)

    def of_function(self, number: int) -> CallBatch:
        """Return the completions that a function, given by index, is asked about."""
        part = copy.copy(self)
        part._chosen = self._request["asked"].get(str(number), self._chosen)
        return part

    def arguments(
        self, signature: Signature, args: Mapping[str, Any], log: MetricLog
    ) -> dict[str, Any]:
        """Return the keyword arguments of a call, sharing nothing with other calls or samples."""
        request = self._request
        of = [request["prompt_of"][index] for index in self._chosen]
        # Sets of prompts may have different columns; one that a row lacks is None there.
        columns = dict.fromkeys(name for row in self._columns for name in row)
        values: dict[str, Callable[[], list[Any]]] = {
            name: lambda name=name: [_own(self._columns[index].get(name)) for index in of]
            for name in columns
        } | {
            "completions": lambda: [request["completions"][index] for index in self._chosen],
            "prompts": lambda: [request["prompts"][index] for index in of],
            "completion_ids": self._ids,
        }
        arguments = {name: value() for name, value in values.items() if signature.takes(name)}
        beside = {
            "trainer_state": TrainerState(*request["state"]),
            "log_metric": log.add,
            "dataset": [request["datasets"][index] for index in of],
        }
        named = NAMED_ONLY & set(signature.accepted) - set(args) - set(columns)
        return (
            arguments
            | {name: beside[name] for name in named}
            | {name: _own(value) for name, value in args.items()}
        )

    def _ids(self) -> list[list[int]]:
        every = unpack_ids(self._blob, self._request["lengths"])
        return [every[index] for index in self._chosen]


def _own(value: Any) -> Any:
    can_change = isinstance(value, list | dict | tuple | set) or hasattr(value, "dtype")
    return copy.deepcopy(value) if can_change else value
