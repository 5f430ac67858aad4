"""What each loss compares and averages: one function for each `grpo.loss_type`, found by its name.

To add a loss, write its function here and its name in `GrpoSection.loss_type`. It returns the log
of each token's importance ratio, which is then clipped, and each token's weight in the loss.
Example: completions of 2 and 4 tokens, at most 8. A token of the first weighs 1/4 in ``grpo``, 1/6
in ``bnpo`` and ``dapo``, 1/16 in ``dr_grpo``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSize:
    """Size of a mini-batch over all ranks; samples that do not train are not counted."""

    num_samples: int
    """Samples that train; 1 when none does."""
    num_tokens: int
    """Their sampled tokens; 1 when there is none."""
    max_completion_length: int
    """Limit of the recipe."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenRows:
    """Sampled tokens of one microbatch that this rank holds, and whose they are."""

    new_logprobs: Float[torch.Tensor, " tokens"]
    """Under the weights being trained, at the sampling temperature, in nats; differentiable."""
    old_logprobs: Float[torch.Tensor, " tokens"]
    """Of the trainer, before the update."""
    sample: Int64[torch.Tensor, " tokens"]
    """Index of the token's sample among those of the microbatch."""
    lengths: Float[torch.Tensor, " samples"]
    """Sampled tokens of each sample, those of other ranks included."""
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor]
    """Adds up values over the ranks that hold rows of these samples, without gradient."""

    @property
    def log_ratio(self) -> Float[torch.Tensor, " tokens"]:
        """Log of each token's own importance ratio."""
        return self.new_logprobs - self.old_logprobs

    @property
    def length(self) -> Float[torch.Tensor, " tokens"]:
        """Sampled tokens of each token's sample."""
        return self.lengths[self.sample]

    def sample_sums(self, values: Float[torch.Tensor, " tokens"]) -> Float[torch.Tensor, " tokens"]:
        """Return for each token the sum over its sample's, on whatever rank; without gradient.

        Collective over the ranks that share samples. Two samples on two ranks: tokens 1, 2 of the
        first and 4 of the second here, 8 of the first there, give 11, 11, 4 here and 11 there.
        """
        here = torch.zeros_like(self.lengths).index_add_(0, self.sample, values.detach())
        return self.sum_over_ranks(here)[self.sample]


Terms = tuple[Float[torch.Tensor, " tokens"], Float[torch.Tensor, " tokens"] | float]
"""Log of the importance ratio, differentiable, and weight in the loss, for each token."""


def grpo(rows: TokenRows, batch: BatchSize) -> Terms:
    """Average over a sample's tokens, then over samples.

    Source: GRPO, arXiv 2402.03300, equation 3.
    """
    return rows.log_ratio, 1 / (batch.num_samples * rows.length)


def dr_grpo(rows: TokenRows, batch: BatchSize) -> Terms:
    """Divide the sum by the same length for every sample.

    Source: Dr. GRPO, arXiv 2503.20783, equation 2.
    """
    return rows.log_ratio, 1 / (batch.num_samples * batch.max_completion_length)


def dapo(rows: TokenRows, batch: BatchSize) -> Terms:
    """Average over all tokens of the mini-batch.

    Source: DAPO, arXiv 2503.14476, equation 8.
    """
    return rows.log_ratio, 1 / batch.num_tokens


def bnpo(rows: TokenRows, batch: BatchSize) -> Terms:
    """As `dapo`: elsewhere the two differ in what is called a batch, here the mini-batch."""
    return dapo(rows, batch)
