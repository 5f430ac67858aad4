"""Bytes of the candidates of truncated sampling on the trainer, as far as a recipe bounds them."""

from __future__ import annotations

from moe_replay.plan.trainer.settings import Settings
from moe_replay.recipe.sections.rollout import RolloutSection

_WORD_BYTES = 16
"""Of a candidate on the device: its row and its word."""
_ROW_BYTES = 8
"""Of a token with candidates."""


def candidate_bytes(settings: Settings, per_token: float, tokens: int | None = None) -> float:
    """Return the most bytes on the device of a rank of the last stage for one microbatch.

    Every one of its tokens (by default as many as in the update) has ``per_token`` candidates, all
    in this rank's part of the vocabulary.

    Example: 16,384 tokens with 20 candidates are 16,384 x (20 x 16 + 8) = 5.4 MB.
    """
    rows = (tokens or settings.max_tokens) / settings.layout.context_parallel_size
    return rows * (per_token * _WORD_BYTES + _ROW_BYTES)


def most_candidates(rollout: RolloutSection, vocab_size: int) -> int:
    """Return the most ids that a token may be drawn from; 0 where the recipe does not bound them.

    Only ``top_k`` bounds them: a distribution that is nearly flat keeps most ids under any
    ``top_p`` below 1 and any ``min_p``.
    """
    return min(rollout.top_k, vocab_size)


def candidates_in_words(rollout: RolloutSection, settings: Settings, vocab_size: int) -> str | None:
    """Return what a plan assumes of candidates; None where nothing is truncated."""
    if not rollout.truncates:
        return None
    tokens = settings.max_tokens
    bound = most_candidates(rollout, vocab_size)
    if bound:
        size = candidate_bytes(settings, bound)
        return (
            f"every token has rollout.top_k = {bound} of them: {size / 1e6:,.1f} MB on the last "
            f"stage for a microbatch of {tokens} tokens, in its sums"
        )
    every, all_words = (candidate_bytes(settings, number) for number in (100, vocab_size))
    return (
        f"in no sum, as nothing bounds them without rollout.top_k: 100 a token are {every / 1e6:,.1f} "
        f"MB on the last stage for a microbatch of {tokens} tokens, all {vocab_size} would be "
        f"{all_words / 1e9:,.1f} GB; rollout/candidates_mean of a run says how many there are"
    )
