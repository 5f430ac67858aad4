"""Routes of given tokens: an engine runs them as a prompt and records the experts that they use.

In: an engine, completions that some engine sampled. Out: traces of the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from moe_replay.engines.types import Engine, Request, RolloutGroup, SamplingParams
from moe_replay.errors import EngineError
from moe_replay.routing import RoutingTrace

# One token is drawn after the given ones and dropped.
_SAMPLING = SamplingParams(max_completion_length=1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GivenTokens:
    """Tokens whose routes are wanted."""

    name: str
    """Name of their trace."""
    token_ids: Int32[np.ndarray, " tokens"]
    """``[tokens]`` of prompt and completion, at least two."""


def given_tokens(groups: Iterable[RolloutGroup]) -> Iterator[GivenTokens]:
    """Yield the tokens of every completion, prompt included, named as in rollouts on disk."""
    from moe_replay.engines.files.group_log import trace_name

    for group in groups:
        for number, completion in enumerate(group.completions):
            yield GivenTokens(
                name=trace_name(group.request.request_id, number),
                token_ids=group.request.sequence(completion.token_ids),
            )


def in_calls(samples: Iterable[GivenTokens], *, max_tokens: int) -> Iterator[list[GivenTokens]]:
    """Yield the samples in groups of at most ``max_tokens`` with padding; a longer one goes alone.

    Tokens of 5, 6, 40 and 7 in groups of 20 give ``[5, 6], [40], [7]``.
    """
    waiting: list[GivenTokens] = []
    for sample in samples:
        longest = max(len(each.token_ids) for each in [*waiting, sample])
        if waiting and longest * (len(waiting) + 1) > max_tokens:
            yield waiting
            waiting = []
        waiting.append(sample)
    if waiting:
        yield waiting


def record_given(
    engine: Engine, samples: Sequence[GivenTokens]
) -> Iterator[tuple[str, RoutingTrace]]:
    """Yield (name, trace) of every sample, as ``engine`` routes its tokens by its current weights.

    As in every trace of an engine, the row of the last token is not valid: it is never run.

    Raises:
        EngineError: when the engine fails, or records no routes of prompts.
    """
    requests = [
        Request(request_id=number, prompt_ids=sample.token_ids[:-1], num_generations=1)
        for number, sample in enumerate(samples)
    ]
    groups = engine.generate(requests, _SAMPLING)
    for sample, group in zip(samples, groups, strict=True):
        recorded = group.completions[0].trace
        if recorded is None:
            raise EngineError(
                f"{engine.description.name} returned no routes for {sample.name}: it records none of "
                "prompts"
            )
        yield (
            sample.name,
            RoutingTrace.record(
                recorded.expert_ids,
                token_ids=sample.token_ids,
                valid=recorded.valid,
                layers=recorded.layers,
                num_experts=recorded.num_experts,
                origin=recorded.origin,
            ),
        )
