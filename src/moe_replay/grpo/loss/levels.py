"""Whose ratio a token is compared by: a function for each `grpo.importance_sampling_level`."""

from __future__ import annotations

import torch
from jaxtyping import Float

from moe_replay.grpo.loss.rows import TokenRows


def token(rows: TokenRows) -> Float[torch.Tensor, " tokens"]:
    """Return the log of each token's own ratio."""
    return rows.log_ratio


def sequence_token(rows: TokenRows) -> Float[torch.Tensor, " tokens"]:
    """Return the mean log ratio of the token's sample, with the token's own gradient.

    Samples of 3 tokens and log ratios of 0.1, 0.2, 0.3 have 0.2 at each.

    Source: GSPO-token, arXiv 2507.18071, equation 14.
    """
    own = rows.new_logprobs - rows.new_logprobs.detach()
    return rows.sample_means(rows.log_ratio) + own


def sequence(rows: TokenRows) -> Float[torch.Tensor, " tokens"]:
    """Return the mean log ratio of the token's sample.

    The gradient of the mean gives each of n tokens 1/n of what all of them together pull. As long
    as the tokens of a sample weigh the same, that is what each pulls alone, so this is
    `sequence_token`; the recipe refuses it where they do not. Nothing then has to be added up over
    ranks in the backward pass.

    Source: GSPO, arXiv 2507.18071, equations 5 to 7, and section 4.3.
    """
    return sequence_token(rows)
