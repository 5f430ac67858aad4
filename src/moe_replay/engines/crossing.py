"""A completion that a weight push interrupted: one completion from its parts, with their spans.

In: what was sampled under each policy version. Out: one completion, whose trace says which rows are
of which version.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moe_replay.engines.types import Completion, Request
from moe_replay.errors import EngineError
from moe_replay.routing.candidates import Candidates
from moe_replay.routing.stitch import EngineCall, merge_partial


def continued(request: Request, parts: Sequence[Completion]) -> Request:
    """Return the request for the rest of a completion, whose prompt ends with the tokens so far."""
    return replace(
        request, prompt_ids=np.concatenate([request.prompt_ids, *(p.token_ids for p in parts)])
    )


def joined(request: Request, parts: Sequence[Completion], *, where: str) -> Completion:
    """Return one completion from its parts, each sampled with the parts before it in its prompt.

    Example: a prompt of 3 tokens, 2 tokens under version 4, then 3 under version 5. Rows 0 to 3 of
    the trace are of version 4. Row 4, the second token, was first fed under version 5, which so
    sampled the third token from it: rows 4 to 7 are of version 5.

    Raises:
        TokenMismatchError: when a trace is bound to other tokens than its part has.
    """
    parts = [part for part in parts[:-1] if len(part.token_ids)] + [parts[-1]]
    if len(parts) == 1:
        return parts[0]
    first, last = parts[0], parts[-1]
    trace = last.trace
    if trace is not None:
        trace = merge_partial(
            [_call(request, parts, number) for number in range(len(parts))], where=where
        ).trace
    return Completion(
        token_ids=np.concatenate([part.token_ids for part in parts]),
        rollout_logprobs=np.concatenate([part.rollout_logprobs for part in parts]),
        candidates=joined_candidates(parts),
        trace=trace,
        finish_reason=last.finish_reason,
        policy_version=last.policy_version,
        began_under=None if first.policy_version == last.policy_version else first.policy_version,
    )


def joined_candidates(parts: Sequence[Completion]) -> Candidates | None:
    """Return the candidates of all sampled tokens of the parts; None where none has any.

    Raises:
        EngineError: when only some have.
    """
    given = [part.candidates for part in parts if part.candidates is not None]
    if given and len(given) < len(parts):
        raise EngineError(
            f"{len(given)} of {len(parts)} parts of a completion have candidates, expected all or "
            "none: its parts were sampled differently"
        )
    return Candidates.concat(given) if given else None


def _call(request: Request, parts: Sequence[Completion], number: int) -> EngineCall:
    part = parts[number]
    assert part.trace is not None
    return EngineCall(
        fed_ids=continued(request, parts[:number]).prompt_ids,
        sampled_ids=part.token_ids,
        trace=part.trace,
    )
