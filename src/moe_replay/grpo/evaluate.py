"""The station that samples and scores held-out prompts under the current weights."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import comb

import numpy as np
from jaxtyping import Float64

from moe_replay.engines.types import Request, RolloutGroup
from moe_replay.grpo.answers import ask_engine, ask_rewards
from moe_replay.grpo.engines import eval_sampling
from moe_replay.grpo.export import write_export
from moe_replay.grpo.kept import kept_completions
from moe_replay.grpo.measured import measured_on
from moe_replay.grpo.metrics import Tally, function_tally
from moe_replay.grpo.records import EXPORT_FOLDER, CompletionRecord, EvalRecord
from moe_replay.grpo.run import BestStep, Run
from moe_replay.grpo.stopping import StepDropped
from moe_replay.grpo.turns import converse
from moe_replay.grpo.types import Conversation
from moe_replay.recipe.sections.run import MAX_HELD_OUT, EvalSection, held_out_number
from moe_replay.tasks.encoding import Prompt
from moe_replay.tasks.rewards.rewards import ScoredBatch

EVAL_REQUESTS = 1 << 40
"""First request id of evaluations, so that they never share sampling noise with training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A held-out prompt that this rank asks for."""

    held_out: str
    """Name of its set."""
    index: int
    """Its index in the set."""
    prompt: Prompt
    request: Request


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answers:
    """What this rank has of held-out prompts, all completions of each one after the other."""

    asked: Sequence[_Asked]
    groups: Sequence[RolloutGroup]
    texts: Sequence[str]
    scored: ScoredBatch
    conversations: Sequence[Conversation]
    """One a completion; none without an environment."""

    def of_set(self, name: str) -> _Answers:
        """Return the part that belongs to a held-out set."""
        rows = [row for row, each in enumerate(self.asked) if each.held_out == name]
        size = len(self.texts) // max(1, len(self.asked))
        at = np.array([row * size + n for row in rows for n in range(size)], dtype=np.int64)
        return _Answers(
            asked=[self.asked[row] for row in rows],
            groups=[self.groups[row] for row in rows],
            texts=[self.texts[number] for number in at],
            scored=ScoredBatch(
                scores={function: values[at] for function, values in self.scored.scores.items()},
                total=self.scored.total[at],
                failed={name: gone[at] for name, gone in self.scored.failed.items()},
            ),
            conversations=[self.conversations[n] for n in at] if self.conversations else (),
        )


def evaluate(run: Run) -> None:
    """Report the rewards of held-out prompts; still owed when the run is asked to stop meanwhile.

    All sets are sampled together, and reported each by itself.
    """
    run.evaluation_is_owed = bool(run.inputs.held_out)
    if not run.evaluation_is_owed:
        return
    started = time.perf_counter()
    with run.station("eval"):
        try:
            answers = _answers(run, list(_asked(run)))
        except StepDropped:
            return
        metrics: dict[str, float] = {}
        kept: list[CompletionRecord] = []
        for name in run.inputs.held_out:
            part = answers.of_set(name)
            tally = _tally(part.scored, f"eval/{name}" if name else "eval", run.recipe.eval)
            metrics |= Tally.merge(run.ranks.gather(tally)).finish()
            kept += _kept(run, name, part)
    record = EvalRecord(step=run.step, metrics=metrics, seconds=time.perf_counter() - started)
    run.reporter.evaluation(record, kept)
    run.evaluation_is_owed = False
    _keep_best(run, metrics)


def _answers(run: Run, asked: Sequence[_Asked]) -> _Answers:
    """Return what the policy answers, scored; collective.

    Raises:
        StepDropped: on every rank, when one of them was asked to stop.
    """
    requests, sampling = [each.request for each in asked], eval_sampling(run.recipe)
    conversations: tuple[Conversation, ...] = ()
    if run.inputs.environment is None:
        groups, _ = ask_engine(run, requests, sampling)
    else:
        talks = converse(run, [each.prompt for each in asked], requests, sampling, ask=ask_engine)
        groups, conversations = talks.groups, talks.conversations
        begun = zip(asked, talks.prompts, strict=True)
        asked = [replace(each, prompt=prompt) for each, prompt in begun]
    completions = [completion for group in groups for completion in group.completions]
    prompts = [each.prompt for each in asked for _ in range(run.recipe.eval.num_generations)]
    texts = [run.decode(completion) for completion in completions]
    return _Answers(
        asked=asked,
        groups=groups,
        texts=texts,
        scored=ask_rewards(run, prompts, completions, texts, conversations),
        conversations=conversations,
    )


def _keep_best(run: Run, metrics: Mapping[str, float]) -> None:
    """Note whether this evaluation is the best so far, and write its model; collective.

    The weights before the first step have no checkpoint, so they are never the best.
    """
    settings = run.recipe.checkpoint
    name = settings.metric_for_best_model
    if name is None or run.step == 0:
        return
    value = metrics.get(name)
    if value is None:
        run.journal.warn(
            f"the evaluation after step {run.step} has no {name}, by which the best model is "
            "chosen: no completion of it has a score"
        )
        return
    best = run.best
    is_better = best is None or (
        value > best.value if settings.greater_is_better else value < best.value
    )
    if is_better:
        run.best = BestStep(
            step=run.step,
            value=value,
            metric=name,
            is_greatest=settings.greater_is_better,
            measured_on=measured_on(run.recipe, run.inputs.held_out, name)
            if best is None
            else best.measured_on,
        )
        if settings.export:
            folder = run.directory / f"{EXPORT_FOLDER}-best"
            write_export(run.actor, run.recipe, folder)


def held_out_id(name: str, index: int) -> int:
    """Return the request id, and so the noise, of a held-out prompt: by the name of its set.

    Sets that come, go or change places leave the noise of the others as it was. Example: prompt 3
    of ``data.eval``, whose name is empty, has the id ``EVAL_REQUESTS + 3``.
    """
    assert index < MAX_HELD_OUT
    return EVAL_REQUESTS + held_out_number(name) * MAX_HELD_OUT + index


def _asked(run: Run) -> Iterator[_Asked]:
    """Yield the held-out prompts that this rank asks for, set after set."""
    first = 0
    for asked in run.recipe.held_out_sets:
        source = run.inputs.held_out[asked.name]
        count = min(asked.size, source.num_prompts or asked.size)
        prompts = source.at(0, count)
        # Dealt over all sets together, so that small ones do not all fall to the first ranks.
        for index in range(
            (run.process.rank - first) % run.process.world_size, count, run.process.world_size
        ):
            request = Request(
                request_id=held_out_id(asked.name, index),
                prompt_ids=prompts[index].prompt_ids,
                num_generations=run.recipe.eval.num_generations,
            )
            yield _Asked(held_out=asked.name, index=index, prompt=prompts[index], request=request)
        first += count


def _kept(run: Run, name: str, answers: _Answers) -> list[CompletionRecord]:
    """Return the completions of a set that are kept, on rank 0; collective."""
    return kept_completions(
        run,
        {each.index: each.prompt for each in answers.asked},
        [each.index for each in answers.asked],
        answers.groups,
        texts=answers.texts,
        rewards=answers.scored.scores,
        totals=answers.scored.total,
        conversations=answers.conversations,
        held_out=name,
    )


def _tally(batch: ScoredBatch, prefix: str, settings: EvalSection) -> Tally:
    """Tally what this rank's completions of a held-out set earned."""
    tally = function_tally(batch, f"{prefix}/")
    rewards = {f"{prefix}/rewards/{name}": scores for name, scores in batch.scores.items()}
    for name, scores in {f"{prefix}/reward": batch.total, **rewards}.items():
        given = scores[~np.isnan(scores)]
        tally.add_mean(name, total=float(given.sum()), count=len(given))
    unscored = int(np.isnan(batch.total).sum())
    tally.add_mean(f"{prefix}/unscored_ratio", total=unscored, count=len(batch.total))
    tally.add_sum(f"{prefix}/num_items", len(batch.total) // settings.num_generations)
    scores = batch.total if settings.pass_reward is None else batch.scores[settings.pass_reward]
    for row in scores.reshape(-1, settings.num_generations):
        _tally_passes(tally, prefix, row, settings)
    return tally


def _tally_passes(
    tally: Tally, prefix: str, scores: Float64[np.ndarray, " generations"], settings: EvalSection
) -> None:
    """Tally whether k completions of one prompt pass; those without a score are not among them."""
    given = scores[~np.isnan(scores)]
    num_passed = int((given >= settings.pass_threshold).sum())
    for k in settings.pass_k:
        enough = k <= len(given)
        chance = pass_at(k, len(given), num_passed) if enough else 0.0
        tally.add_mean(f"{prefix}/pass@{k}", total=chance, count=int(enough))


def pass_at(k: int, num_completions: int, num_passed: int) -> float:
    """Return the chance that one of k completions passes, drawn from those without replacement.

    It is unbiased: its mean over samplings is the chance for k new completions. Example: of 4
    completions 1 passes; 3 of the 6 pairs hold it, so pass@2 is 0.5. The chance from the rate,
    1 - (3/4)^2 = 0.4375, is too low.

    Source: Codex, arXiv 2107.03374, equation 1.
    """
    assert 0 < k <= num_completions and 0 <= num_passed <= num_completions
    return 1.0 - comb(num_completions - num_passed, k) / comb(num_completions, k)
