"""The station that takes a divergence from the reference model off rewards, and compares again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from moe_replay.grpo.rounds import Rounds, compared
from moe_replay.grpo.run import Run
from moe_replay.grpo.types import OldScores, Scored
from moe_replay.megatron.scorer import ScoredSample


def penalize(
    run: Run,
    rounds: Rounds,
    scored: Scored,
    old: OldScores,
    reference: Mapping[int, ScoredSample] | None,
) -> tuple[OldScores, Scored]:
    """Compare completions by reward minus ``beta`` times their divergence from the reference.

    That is the sum over a completion's sampled tokens of old minus reference log-probability (k1),
    in nats; ``kl_in_reward/mean`` is its mean over completions. A sample that the guard dropped has
    log-probabilities of other routes than its own: it is compared with nothing. Without
    ``grpo.kl_in_reward`` nothing changes. Collective.

    Example: rewards 1 and 0, sums 3 and -1, beta 0.1: compared are 0.7 and 0.1.

    Source: Megatron-SWIFT, ``kl_in_reward``; RLOO, arXiv 2402.14740, equation 2.
    """
    keys = run.recipe.grpo
    if not keys.kl_in_reward or reference is None:
        return old, scored
    own = {
        old.batch.origins[s.sample_id].index: float(
            old.scored[s.sample_id].token_logprobs.sum(dtype=np.float64)
            - reference[s.sample_id].token_logprobs.sum(dtype=np.float64)
        )
        for s in old.batch.samples
        if s.reported_here
    }
    every = {index: value for part in run.ranks.gather(own) for index, value in part.items()}
    sums = np.array([every[index] for index in range(len(every))])
    learned = rounds.learned
    shape = learned.every_total.shape
    counts = learned.counts.copy()
    counts.reshape(-1)[list(old.judged.dropped)] = False
    totals = learned.every_total - keys.beta * sums.reshape(shape)
    again = compared(run.recipe, replace(learned, every_total=totals, counts=counts))
    flat = again.advantages.reshape(-1)
    advantages = {i: float(flat[origin.index]) for i, origin in enumerate(old.batch.origins)}
    metrics = {**old.metrics, "kl_in_reward/mean": float(sums.mean())}
    return (
        replace(old, batch=old.batch.with_advantages(advantages), metrics=metrics),
        replace(scored, advantages=again.advantages, counts=again.counts),
    )
