"""How each loss averages over tokens: one function for each `grpo.loss_type`, found by its name.

To add a loss, write its function here and its name in `GrpoSection.loss_type`. Example: completions
of 2 and 4 tokens, at most 8. A token of the first weighs 1/4 in ``grpo``, 1/6 in ``bnpo`` and
``dapo``, 1/16 in ``dr_grpo``.

In: the length of a completion, the size of its mini-batch. Out: the weight of each of its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSize:
    """Size of a mini-batch over all ranks; samples that do not train are not counted."""

    num_samples: int
    """Samples that train."""
    num_tokens: int
    """Their sampled tokens."""
    max_completion_length: int
    """Limit of the recipe."""


def grpo(length: int, batch: BatchSize) -> float:
    """Average over a sample's tokens, then over samples.

    Source: GRPO, arXiv 2402.03300, equation 3.
    """
    return 1 / (batch.num_samples * length)


def dr_grpo(length: int, batch: BatchSize) -> float:
    """Divide the sum by the same length for every sample.

    Source: Dr. GRPO, arXiv 2503.20783, equation 2.
    """
    return 1 / (batch.num_samples * batch.max_completion_length)


def dapo(length: int, batch: BatchSize) -> float:
    """Average over all tokens of the mini-batch.

    Source: DAPO, arXiv 2503.14476, equation 8.
    """
    return 1 / batch.num_tokens


def bnpo(length: int, batch: BatchSize) -> float:
    """As `dapo`: elsewhere the two differ in what is called a batch, here the mini-batch."""
    return dapo(length, batch)
