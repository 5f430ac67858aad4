"""Ask the engine for completions and the rewards for scores, for training and evaluation alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float64

from moe_replay.engines.checks import check_groups
from moe_replay.engines.types import Completion, Request, RolloutGroup, SamplingParams
from moe_replay.grpo.run import Run
from moe_replay.grpo.types import Conversation
from moe_replay.recipe.sections.rollout import FilesEngineSection
from moe_replay.tasks.encoding import Prompt
from moe_replay.tasks.rewards.rewards import ScoredBatch


def ask_engine(
    run: Run, requests: Sequence[Request], sampling: SamplingParams
) -> tuple[list[RolloutGroup], int]:
    """Return the engine's groups, checked and ended at stop strings, and the tokens cut off there.

    Raises:
        StepDropped: on every rank, when one of them was asked to stop.
        EngineError: on every rank, when the engine of one fails or breaks the contract. Where ranks
            share an engine that fails while it samples, only on that one: the others wait inside.
    """
    # The ranks of one vLLM take their steps together, so none of them may leave alone.
    alone = run.recipe.rollout.ranks_per_engine == 1
    with run.device.sampling():
        if not alone:
            # vLLM's own collectives would give up on a rank that still reads its prompts.
            run.ranks.barrier()
        groups = run.droppable(lambda: run.engine.generate(requests, sampling), alone=alone)

    def checked() -> tuple[list[RolloutGroup], int]:
        check_answer(run, groups, requests, sampling, trained_at=run.policy_version)
        return end_at_stops(run, groups)

    return run.droppable(checked)


def check_answer(
    run: Run,
    groups: Sequence[RolloutGroup],
    requests: Sequence[Request],
    sampling: SamplingParams,
    *,
    trained_at: int,
    max_staleness: int = 0,
) -> None:
    """Hold what an engine returned to its contract.

    ``trained_at`` is the trainer's policy version when it learns from them, and ``max_staleness``
    how many versions older they may be.

    Raises:
        EngineError: when it breaks the contract.
        DivergedError: when a log-probability is NaN.
    """
    rollout = run.recipe.rollout
    takes_any = isinstance(rollout, FilesEngineSection) and rollout.allow_stale
    check_groups(
        groups,
        requests,
        sampling,
        run.engine.description,
        vocab_size=run.actor.vocab_size,
        policy_versions=None
        if takes_any
        else range(max(0, trained_at - max_staleness), run.policy_version + 1),
    )


def end_at_stops(run: Run, groups: Sequence[RolloutGroup]) -> tuple[list[RolloutGroup], int]:
    """End completions at stop strings; return the groups, and the tokens cut off there."""
    cut = [run.stop_strings.cut(group) for group in groups]
    return [group for group, _ in cut], sum(count for _, count in cut)


def ask_rewards(
    run: Run,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    texts: Sequence[str],
    conversations: Sequence[Conversation] = (),
) -> ScoredBatch:
    """Return the scores of this rank's completions; one without a token has none, and is not shown.

    Of a conversation reward functions see the last turn as text, and the sampled tokens of all
    turns; its environment's own score stands beside theirs.

    Raises:
        RewardError: on every rank, when a reward function fails on any of them.
        StepDropped: on every rank, when one of them was asked to stop.
    """
    written = [index for index, c in enumerate(completions) if len(c.token_ids)]
    # An answer that the prompt begins is one text to a reward.
    shown = [prompt.prefill + text for prompt, text in zip(prompts, texts, strict=True)]
    for index, talk in enumerate(conversations):
        if len(talk.turns) > 1:
            shown[index] = talk.turns[-1].text
    batch = run.droppable(
        lambda: run.inputs.rewards.score(
            [prompts[index] for index in written],
            [shown[index] for index in written],
            [completions[index].sampled_ids for index in written],
            state=(run.finished_steps, run.recipe.run.max_steps),
        )
    )

    def of_all(scores: Float64[np.ndarray, " written"]) -> Float64[np.ndarray, " n"]:
        every = np.full(len(completions), np.nan)
        every[written] = scores
        return every

    if batch.failed and (told := run.ranks.first("; ".join(batch.notes) or None)):
        run.journal.warn_once(
            f"tolerated failure {sorted(batch.failed)}",
            f"{told[1]}; its completions are counted in rewards/<name>/failed_ratio",
        )
    scored = replace(
        batch,
        scores={name: of_all(scores) for name, scores in batch.scores.items()},
        total=of_all(batch.total),
        failed={name: of_all(gone.astype(float)) == 1 for name, gone in batch.failed.items()},
    )
    return _with_environment(run, scored, conversations)


def _with_environment(
    run: Run, scored: ScoredBatch, conversations: Sequence[Conversation]
) -> ScoredBatch:
    """Return scores with those of the environment; a total of none but NaN stays NaN."""
    environment = run.inputs.environment
    if environment is None or not environment.process.description.has_reward:
        return scored
    earned = np.array([talk.reward for talk in conversations], dtype=np.float64)
    weighted = earned * environment.section.weight
    total = np.where(
        np.isnan(scored.total),
        weighted,
        np.where(np.isnan(weighted), scored.total, scored.total + weighted),
    )
    scores = {**scored.scores, environment.section.name: earned}
    return replace(scored, scores=scores, total=total)
