"""TraceGroup: the traces of several samples of one prompt, with the rows of that prompt held once.

Engines return the prompt's routes with each of the n samples, the same bytes n times. Here they are kept once, and
what differs all the same (a prompt row that another batch routed otherwise, or a row that the prefix cache left out) is
kept beside them, row by row, so that `TraceGroup.split` gives back exactly what was joined.

In: traces of one prompt. Out: TraceGroup.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moe_replay.errors import TokenMismatchError, TraceError
from moe_replay.routing.arrays import kept, owned
from moe_replay.routing.digest import first_difference, join_digests
from moe_replay.routing.trace import Origin, RoutingTrace

if TYPE_CHECKING:
    from jaxtyping import Bool, Int64, Integer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PromptDifference:
    """The prompt rows of one sample that are not those of the group."""

    rows: Int64[np.ndarray, " different"]
    """``[different]``, increasing rows of the prompt; empty when the sample shares every row."""
    expert_ids: Integer[np.ndarray, "different layers topk"]
    """``[different, layers, topk]``, what the sample holds there."""
    valid: Bool[np.ndarray, " different"]
    """``[different]``; False where the sample has no route although the group has one."""

    def __post_init__(self) -> None:
        for name in ("rows", "expert_ids", "valid"):
            object.__setattr__(self, name, kept(getattr(self, name)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TraceGroup:
    """The traces of n samples of one prompt; the prompt's rows are those of sample 0."""

    prompt: RoutingTrace
    """``[prompt]`` rows, bound to the prompt's tokens."""
    completions: tuple[RoutingTrace, ...]
    """One a sample: the rows of its sampled tokens, bound to these tokens alone."""
    differences: tuple[PromptDifference, ...]
    """One a sample; that of sample 0 is empty."""
    origins: tuple[Origin, ...]
    """One a sample, with spans over prompt and completion."""

    def __post_init__(self) -> None:
        if not len(self.completions) == len(self.differences) == len(self.origins) > 0:
            raise TraceError(
                f"a group of {len(self.completions)} completions has {len(self.differences)} differences and "
                f"{len(self.origins)} origins, expected one of each for every sample, and at least one sample"
            )
        for number, difference in enumerate(self.differences):
            rows = difference.rows
            if len(rows) and (
                rows[0] < 0 or rows[-1] >= len(self.prompt) or (np.diff(rows) < 1).any()
            ):
                raise TraceError(
                    f"sample {number}: different rows {rows.tolist()} of a prompt of {len(self.prompt)}, expected "
                    "increasing rows of the prompt"
                )

    @classmethod
    def join(
        cls, traces: Sequence[RoutingTrace], *, num_prompt_tokens: int, where: str
    ) -> TraceGroup:
        """Join the traces of all samples of one prompt; the group holds copies, so the traces can be released.

        Two traces of ``P + T`` rows take ``P + 2 T`` rows here, plus those prompt rows in which they differ.

        Raises:
            TokenMismatchError: when the prompts are not the same tokens.
            TraceError: when there is no trace, one is of another model, or one ends within the prompt.
        """
        if not traces:
            raise TraceError(f"{where}: no trace to join; a group has at least one sample")
        first = traces[0]
        for number, trace in enumerate(traces):
            _check_prompt(trace, first, num_prompt_tokens, f"{where}, sample {number}")
        prompt = _copied(first.crop(0, num_prompt_tokens))
        return cls(
            prompt=prompt,
            completions=tuple(_copied(t.crop(num_prompt_tokens, len(t))) for t in traces),
            differences=tuple(_difference(prompt, trace) for trace in traces),
            origins=tuple(trace.origin for trace in traces),
        )

    def split(self) -> list[RoutingTrace]:
        """Return the full trace of every sample, as it was joined."""
        return [self.trace(number) for number in range(len(self.completions))]

    def trace(self, number: int) -> RoutingTrace:
        """Return the full trace of sample ``number``."""
        completion, difference = self.completions[number], self.differences[number]
        ids = np.concatenate([self.prompt.expert_ids, completion.expert_ids])
        valid = np.concatenate([self.prompt.valid, completion.valid])
        ids[difference.rows], valid[difference.rows] = difference.expert_ids, difference.valid
        return RoutingTrace(
            expert_ids=owned(ids),
            valid=owned(valid),
            layers=self.prompt.layers,
            num_experts=self.prompt.num_experts,
            token_digest=owned(join_digests([self.prompt.token_digest, completion.token_digest])),
            origin=self.origins[number],
        )

    @property
    def num_different_rows(self) -> tuple[int, ...]:
        """Prompt rows of each sample that are not those of sample 0: not 0 when the engine routed a prompt twice."""
        return tuple(len(difference.rows) for difference in self.differences)

    @property
    def routes_bytes(self) -> int:
        """Bytes of all expert ids held."""
        held = [self.prompt.expert_ids, *(part.expert_ids for part in self.completions)]
        held += [difference.expert_ids for difference in self.differences]
        return sum(array.nbytes for array in held)


def _check_prompt(
    trace: RoutingTrace, first: RoutingTrace, num_prompt_tokens: int, where: str
) -> None:
    ours = (first.layers, first.num_experts, first.topk)
    theirs = (trace.layers, trace.num_experts, trace.topk)
    if ours != theirs:
        raise TraceError(
            f"{where}: (layers, experts, topk) are {theirs}, those of sample 0 {ours}; a group is sampled by one model"
        )
    if not 1 <= num_prompt_tokens < len(trace):
        raise TraceError(
            f"{where}: {num_prompt_tokens} prompt tokens of {len(trace)} rows, expected at least one row of the prompt and "
            "one sampled token; the trace was cropped, or holds incremental rows only"
        )
    prompt = slice(0, num_prompt_tokens)
    row = first_difference(trace.token_digest[prompt], first.token_digest[prompt])
    if row is not None:
        raise TokenMismatchError(
            f"{where}: its prompt differs from that of sample 0 from row {row} of {num_prompt_tokens} on; the samples are "
            "of two prompts, or num_prompt_tokens counts sampled tokens too"
        )


def _copied(part: RoutingTrace) -> RoutingTrace:
    """Return a trace with memory of its own: a slice would keep the whole array of its sample alive."""
    return RoutingTrace(
        expert_ids=owned(part.expert_ids.copy()),
        valid=owned(part.valid.copy()),
        layers=part.layers,
        num_experts=part.num_experts,
        token_digest=owned(part.token_digest.copy()),
        origin=part.origin,
    )


def _difference(prompt: RoutingTrace, trace: RoutingTrace) -> PromptDifference:
    """Find the rows that do not hold the same; what two rows without a route hold makes no difference."""
    size = len(prompt)
    ids, valid = trace.expert_ids[:size], trace.valid[:size]
    other_route = (ids != prompt.expert_ids).any(axis=(1, 2)) & valid
    rows = np.flatnonzero(other_route | (valid != prompt.valid))
    return PromptDifference(rows=rows, expert_ids=ids[rows], valid=valid[rows])
