"""RoutedSample: a completion of TRL with its routes, bound to its tokens and laid into its rows.

TRL shuffles and splits its batch; a list of these under a key of their own follows it, and each is
compared with the tokens of its row before its routes are used.

In: samples, ``input_ids``, ``attention_mask``. Out: `PlacedRoutes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt

from moe_replay.errors import ReplayScopeError, TokenMismatchError
from moe_replay.routing import Coverage, RoutingTrace
from moe_replay.routing.arrays import as_array
from moe_replay.routing.digest import digest_tokens, first_difference
from moe_replay.transformers import place_traces


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoutedSample:
    """One completion as it was sampled."""

    number: int
    """Counts the samples of a run, over all processes, from 0."""
    prompt: int
    """Counts the prompts of a run likewise."""
    token_ids: Int64[np.ndarray, " tokens"]
    """``[tokens]``, prompt and completion."""
    num_prompt_tokens: int
    """How many of them are the prompt."""
    step: int
    """Optimizer steps before it was sampled."""
    trace: RoutingTrace | None = None
    """Its routes; None while nothing has recorded them."""
    rollout_logprobs: Float32[np.ndarray, " completion"] | None = None
    """``[completion]``, of the tokens as sampled, in nats; None where the engine gave none."""

    @property
    def where(self) -> str:
        """What messages call it."""
        return f"sample {self.number} (prompt {self.prompt}, sampled at step {self.step})"

    def of_row(
        self, row: Int64[np.ndarray, " width"], held: Bool[np.ndarray, " width"]
    ) -> RoutedSample:
        """Return the sample as it stands in a row of a batch, cut where TRL masks its completion.

        ``held`` is the attention mask. ``mask_truncated_completions`` takes the whole completion
        out of it.

        Raises:
            TokenMismatchError: when the row holds other tokens.
        """
        first, num_held = int(held.argmax()), int(held.sum())
        tokens = row[first : first + len(self.token_ids)]
        differs = first_difference(digest_tokens(self.token_ids), digest_tokens(tokens))
        if differs is not None or num_held not in (len(self.token_ids), self.num_prompt_tokens):
            at = "" if differs is None else f", which differ from token {differs} on"
            raise TokenMismatchError(
                f"{self.where} has {len(self.token_ids)} tokens, its row of the batch {num_held}{at}; "
                "the batch was reordered or its tokens changed without the samples: what TRL "
                "shuffles and splits must keep the list under the key 'moe_replay' in step"
            )
        if num_held == len(self.token_ids):
            return self
        return replace(
            self,
            token_ids=self.token_ids[:num_held],
            trace=None if self.trace is None else self.trace.crop(0, num_held),
            rollout_logprobs=None,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacedRoutes:
    """The routes of a batch, row by row, batch first, padding included."""

    expert_ids: UInt[np.ndarray, "rows layers topk"]
    """``[rows, layers, topk]``; rows with ``valid=False`` hold anything."""
    valid: Bool[np.ndarray, " rows"]
    """``[rows]``, True where a route is replayed."""
    layers: tuple[int, ...]
    """Global decoder index of each entry of the layer dim."""
    sample: Int64[np.ndarray, " rows"]
    """``[rows]``, number of the sample; -1 at padding."""
    position: Int64[np.ndarray, " rows"]
    """``[rows]``, position of the token in its sample."""
    coverage: Coverage
    """What of it is replayed."""


def in_rows(
    samples: Sequence[RoutedSample], input_ids: Any, attention_mask: Any
) -> list[RoutedSample]:
    """Return the samples of a batch, each compared with the tokens of its row.

    Raises:
        ReplayScopeError: when there are more or fewer samples than rows.
        TokenMismatchError: when a sample is not that of its row.
    """
    tokens, held = as_array(input_ids), as_array(attention_mask).astype(bool)
    if len(samples) != len(tokens):
        raise ReplayScopeError(
            f"{len(samples)} routed samples for a batch of {len(tokens)} rows, expected one a row; "
            "the list under the key 'moe_replay' was not split with the batch"
        )
    return [
        sample.of_row(row, mask) for sample, row, mask in zip(samples, tokens, held, strict=True)
    ]


def placed(samples: Sequence[RoutedSample], input_ids: Any, attention_mask: Any) -> PlacedRoutes:
    """Lay the routes of samples that `in_rows` returned into the rows of their batch.

    Raises:
        ReplayScopeError: when a sample has no routes.
    """
    held = as_array(attention_mask).astype(bool)
    traces = [sample.trace for sample in samples if sample.trace is not None]
    if len(traces) != len(samples):
        bare = next(sample for sample in samples if sample.trace is None)
        raise ReplayScopeError(f"{bare.where} has no routes, so it cannot be replayed")
    expert_ids, valid = place_traces(traces, input_ids, held.astype(np.int64))
    numbers = np.array([sample.number for sample in samples], dtype=np.int64)
    return PlacedRoutes(
        expert_ids=expert_ids,
        valid=valid,
        layers=traces[0].layers,
        sample=np.where(held, numbers[:, None], -1).reshape(-1),
        position=np.where(held, held.cumsum(axis=1) - 1, 0).reshape(-1),
        coverage=Coverage.total(
            Coverage.of_rows(trace.valid, prompt_length=min(sample.num_prompt_tokens, len(trace)))
            for sample, trace in zip(samples, traces, strict=True)
        ),
    )


def sample_gaps(
    samples: Sequence[RoutedSample], trainer_logprobs: Any
) -> dict[int, Float32[np.ndarray, " completion"]]:
    """Return trainer's minus rollout's log-probability of each token, by number of the sample.

    ``trainer_logprobs`` is ``[batch, completion]``, padded on the right. Samples without
    log-probabilities of their engine are left out, and so are tokens that it gave none for (NaN).
    """
    found, gaps = as_array(trainer_logprobs), {}
    for row, sample in enumerate(samples):
        if sample.rollout_logprobs is not None:
            given = ~np.isnan(sample.rollout_logprobs)
            mine = found[row, : len(given)] - sample.rollout_logprobs
            gaps[sample.number] = mine[given]
    return gaps
