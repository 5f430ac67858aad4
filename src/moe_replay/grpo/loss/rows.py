"""What every part of the loss is computed from: the sampled tokens of a microbatch, and whose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int64

from moe_replay.grpo.metrics import MAX_LOG_RATIO


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSize:
    """Size of a mini-batch over all ranks; samples that do not train are not counted."""

    num_samples: int
    """Samples that train; 1 when none does."""
    num_tokens: int
    """Their sampled tokens; 1 when there is none."""
    max_completion_length: int
    """Limit of the recipe."""
    num_uncertain: int = 1
    """Tokens that ``grpo.top_entropy_quantile`` keeps; 1 when there is none."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenRows:
    """Sampled tokens of one microbatch that this rank holds, and whose they are."""

    new_logprobs: Float[torch.Tensor, " tokens"]
    """Under the weights being trained, at the sampling temperature, in nats; differentiable."""
    old_logprobs: Float[torch.Tensor, " tokens"]
    """Of the trainer, before the update."""
    advantages: Float[torch.Tensor, " tokens"]
    """Advantage of the token's sample."""
    trains: Bool[torch.Tensor, " tokens"]
    """Whether the token's sample trains."""
    sample: Int64[torch.Tensor, " tokens"]
    """Index of the token's sample among those of the microbatch."""
    lengths: Float[torch.Tensor, " samples"]
    """Sampled tokens of each sample, those of other ranks included."""
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor]
    """Adds up values over the ranks that hold rows of these samples, without gradient."""
    rollout_logprobs: Float[torch.Tensor, " tokens"] | None = None
    """Of the engine; needed where the engine gap is corrected."""
    ref_logprobs: Float[torch.Tensor, " tokens"] | None = None
    """Of the reference model; needed for a KL term."""
    entropies: Float[torch.Tensor, " tokens"] | None = None
    """Of the distributions that the tokens were drawn from, in nats; differentiable. Needed for an
    entropy bonus."""
    is_uncertain: Bool[torch.Tensor, " tokens"] | None = None
    """Tokens that ``grpo.top_entropy_quantile`` keeps; None keeps all."""

    @property
    def log_ratio(self) -> Float[torch.Tensor, " tokens"]:
        """Log of each token's own importance ratio: policy drift."""
        return self.new_logprobs - self.old_logprobs

    @property
    def log_gap(self) -> Float[torch.Tensor, " tokens"]:
        """Log of each token's engine gap, old over engine probability."""
        assert self.rollout_logprobs is not None
        return self.old_logprobs - self.rollout_logprobs

    @property
    def length(self) -> Float[torch.Tensor, " tokens"]:
        """Sampled tokens of each token's sample."""
        return self.lengths[self.sample]

    def sample_sums(self, values: Float[torch.Tensor, " tokens"]) -> Float[torch.Tensor, " tokens"]:
        """Return for each token the sum over its sample's, on whatever rank; without gradient.

        Collective over the ranks that share samples. Two samples on two ranks: tokens 1, 2 of the
        first and 4 of the second here, 8 of the first there, give 11, 11, 4 here and 11 there.
        """
        # In float64, because a GPU adds in any order, and tensor-parallel ranks must agree on which
        # side of a bound a sample is.
        here = torch.zeros_like(self.lengths, dtype=torch.float64)
        here = here.index_add_(0, self.sample, values.detach().double())
        return self.sum_over_ranks(here).to(values.dtype)[self.sample]

    def sample_means(
        self, values: Float[torch.Tensor, " tokens"]
    ) -> Float[torch.Tensor, " tokens"]:
        """Return for each token the mean over its sample's; as `sample_sums`."""
        return self.sample_sums(values) / self.length

    def masked(self) -> TokenRows:
        """Return the rows with 0 in place of every value of a token that does not train.

        Before anything is computed: NaN times a mask of 0 is NaN, and so is its gradient.
        """
        values = {
            field.name: torch.where(self.trains, value, torch.zeros_like(value))
            for field in fields(self)
            if field.name.endswith(("logprobs", "entropies"))
            and (value := getattr(self, field.name)) is not None
        }
        return replace(self, **values)


def bounded_exp(values: Float[torch.Tensor, " tokens"]) -> Float[torch.Tensor, " tokens"]:
    """Return ``exp(x)`` up to M = `MAX_LOG_RATIO`, above it the tangent: ``exp(M) (1 + x - M)``.

    Clamping alone would remove the gradient just where a policy has moved farthest.
    """
    inside = torch.exp(values.clamp(max=MAX_LOG_RATIO))
    return inside * (1 + torch.relu(values - MAX_LOG_RATIO))
