"""The station that samples and scores held-out prompts under the current weights."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moe_replay.engines.types import Request
from moe_replay.grpo.answers import ask_engine, ask_rewards
from moe_replay.grpo.engines import recipe_sampling
from moe_replay.grpo.kept import kept_completions
from moe_replay.grpo.metrics import Tally
from moe_replay.grpo.records import EvalRecord
from moe_replay.grpo.run import Run
from moe_replay.grpo.stopping import StepDropped
from moe_replay.grpo.turns import converse
from moe_replay.grpo.types import Conversation
from moe_replay.tasks.encoding import Prompt
from moe_replay.tasks.rewards.rewards import ScoredBatch

EVAL_REQUESTS = 1 << 40
"""First request id of evaluations, so that they never share sampling noise with training."""


def evaluate(run: Run) -> None:
    """Report the reward of held-out prompts; still owed when the run is asked to stop meanwhile."""
    held_out = run.inputs.held_out
    run.evaluation_is_owed = held_out is not None
    if held_out is None:
        return
    started = time.perf_counter()
    settings = run.recipe.eval
    count = min(run.recipe.data.eval_size, held_out.num_prompts or run.recipe.data.eval_size)
    with run.station("eval"):
        prompts = held_out.at(0, count)
        own = range(run.process.rank, count, run.process.world_size)
        requests = [
            Request(
                request_id=EVAL_REQUESTS + index,
                prompt_ids=prompts[index].prompt_ids,
                num_generations=settings.num_generations,
            )
            for index in own
        ]
        sampling = replace(
            recipe_sampling(run.recipe), temperature=settings.temperature, top_p=1.0, top_k=0
        )
        try:
            conversations: tuple[Conversation, ...] = ()
            if run.inputs.environment is None:
                groups, _ = ask_engine(run, requests, sampling)
            else:
                mine = [prompts[index] for index in own]
                talks = converse(run, mine, requests, sampling, ask=ask_engine)
                groups, conversations = talks.groups, talks.conversations
                prompts = _replaced(prompts, own, talks.prompts)
            completions = [completion for group in groups for completion in group.completions]
            asked = [prompts[index] for index in own for _ in range(settings.num_generations)]
            texts = [run.decode(completion) for completion in completions]
            batch = ask_rewards(run, asked, completions, texts, conversations)
        except StepDropped:
            return
        tally = _tally(batch)
        tally.add_sum("eval/num_items", len(own))
        metrics = Tally.merge(run.ranks.gather(tally)).finish()
        kept = kept_completions(
            run,
            prompts,
            own,
            groups,
            texts=texts,
            rewards=batch.scores,
            totals=batch.total,
            conversations=conversations,
        )
    record = EvalRecord(step=run.step, metrics=metrics, seconds=time.perf_counter() - started)
    run.reporter.evaluation(record, kept)
    run.evaluation_is_owed = False


def _replaced(
    prompts: Sequence[Prompt], own: Sequence[int], changed: Sequence[Prompt]
) -> list[Prompt]:
    by_index = dict(zip(own, changed, strict=True))
    return [by_index.get(index, prompt) for index, prompt in enumerate(prompts)]


def _tally(batch: ScoredBatch) -> Tally:
    """Tally what this rank's held-out completions earned."""
    tally = Tally()
    rewards = {f"eval/rewards/{name}": scores for name, scores in batch.scores.items()}
    for name, scores in {"eval/reward": batch.total, **rewards}.items():
        given = scores[~np.isnan(scores)]
        tally.add_mean(name, total=float(given.sum()), count=len(given))
    unscored = int(np.isnan(batch.total).sum())
    tally.add_mean("eval/unscored_ratio", total=unscored, count=len(batch.total))
    return tally
