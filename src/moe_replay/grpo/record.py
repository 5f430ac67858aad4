"""The station that writes a step down: its metrics over all ranks, and the kept completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from moe_replay.batch import Sample
from moe_replay.engines.types import CountsFaults
from moe_replay.grpo.kept import kept_completions
from moe_replay.grpo.loss.corrections import correction_tally, effective_size
from moe_replay.grpo.metrics import Tally, completion_tally, engine_gap
from moe_replay.grpo.records import CompletionRecord, StepRecord
from moe_replay.grpo.run import Run
from moe_replay.grpo.tokens import kept_tokens, samples_chosen
from moe_replay.grpo.types import Conversation, OldScores, Rollout, Scored, Update
from moe_replay.recipe.recipe import Recipe
from moe_replay.recipe.sections.training import GrpoSection
from moe_replay.routing import Coverage
from moe_replay.routing.candidates import Candidates


def step_record(
    run: Run, rollout: Rollout, scored: Scored, update: Update
) -> tuple[StepRecord, list[CompletionRecord]]:
    """Collect the step's metrics over all ranks, and a record of the completions that are kept."""
    old = update.old
    # What a dropped sample's log-probabilities are under wrong routes says nothing about the
    # engine.
    dropped = old.judged.dropped_here(old.batch)
    own = [s for s in old.batch.samples if s.reported_here and s.sample_id not in dropped]
    tally = Tally.merge([_gap_tally(run, old, own), _rollout_tally(run, rollout)])
    for sample in own:
        entropies = old.scored[sample.sample_id].entropies
        tally.add_mean("entropy/mean", total=float(entropies.sum()), count=len(entropies))
    metrics = (
        dict(scored.metrics)
        | effective_size(Tally.merge(run.ranks.gather(tally)).finish())
        | dict(update.metrics)
        | dict(old.metrics)
    )
    metrics["policy_version"] = float(run.policy_version)
    if run.mode.replays:
        metrics |= _coverage_metrics(run, old)
    metrics |= _fault_metrics(run)
    metrics |= run.device.metrics() | run.journal.push_metrics
    tokens = kept_tokens(run, old)
    everyone = kept_completions(
        run,
        rollout.prompts,
        rollout.own,
        rollout.groups,
        texts=scored.texts,
        rewards={name: scores.reshape(-1) for name, scores in scored.rewards.items()},
        totals=scored.totals.reshape(-1),
        advantages=scored.advantages,
        dropped=old.judged.dropped,
        conversations=rollout.conversations,
        also=samples_chosen(run, old.judged),
    )
    everyone = [
        replace(
            record,
            tokens=tokens.get(index),
            agreement=old.judged.agreement.get(index),
        )
        for record in everyone
        if (index := record.sample) is not None
    ]
    run.journal.warn_of_changes(_notices(run.recipe, metrics))
    record = StepRecord(
        step=run.step,
        metrics=metrics,
        seconds=run.journal.take_seconds(),
        details={**update.details, **old.judged.details},
        warnings=run.journal.take_warnings(),
    )
    return record, everyone


def _gap_tally(run: Run, old: OldScores, own: Sequence[Sample]) -> Tally:
    """Tally the engine gap of samples, and what its correction makes of it."""
    compared = (
        [old.scored[sample.sample_id].token_logprobs for sample in own],
        [sample.rollout_logprobs for sample in own],
    )
    return Tally.merge([engine_gap(*compared), correction_tally(*compared, run.recipe.grpo)])


def _rollout_tally(run: Run, rollout: Rollout) -> Tally:
    """Tally what this rank sampled: lengths, ends, turns and age."""
    tally = completion_tally(
        [len(completion.sampled_ids) for completion in rollout.completions],
        [completion.finish_reason for completion in rollout.completions],
        overlong_filter=run.recipe.grpo.overlong_filter,
    )
    # Our engines never draw them; those of others may.
    unknown = sum(int((c.sampled_ids >= run.num_known_ids).sum()) for c in rollout.completions)
    tally.add_sum("completions/unknown_tokens", unknown)
    if run.recipe.rollout.stop:
        tally.add_sum("completions/tokens_cut_off", rollout.num_cut)
    for completion in rollout.completions:
        if completion.candidates is not None:
            _tally_candidates(tally, completion.candidates)
    if run.may_be_stale:
        tally = Tally.merge([tally, _staleness(rollout)])
    return Tally.merge([tally, _turns(rollout.conversations)])


def _tally_candidates(tally: Tally, candidates: Candidates) -> None:
    counts, mass = candidates.counts, candidates.kept_mass.astype(np.float64)
    limited = counts[counts > 0]
    tally.add_mean("rollout/kept_mass", total=float(mass.sum()), count=len(mass))
    tally.add_mean("rollout/truncated_frac", total=len(limited), count=len(counts))
    tally.add_mean("rollout/candidates_mean", total=int(limited.sum()), count=len(limited))
    if len(limited):
        tally.add_max("rollout/candidates_max", int(limited.max()))


def _turns(conversations: Sequence[Conversation]) -> Tally:
    """Tally the turns of conversations, and the calls of tools in them.

    Source of ``tools/call_frequency`` (calls a completion) and ``tools/failure_frequency``
    (failures a call): TRL, ``GRPOTrainer``.
    """
    tally = Tally()
    for talk in conversations:
        tally.add_mean("environment/dropped_ratio", total=not talk.parts)
        if not talk.parts:
            continue
        count = len(talk.turns)
        tally.add_mean("num_turns/mean", total=count)
        tally.add_min("num_turns/min", count)
        tally.add_max("num_turns/max", count)
        tally.add_mean("num_turns/limit_ratio", total=talk.met_limit)
        given = sum(part.num_tokens for part in talk.parts if part.by == "environment")
        tally.add_mean("completions/environment_tokens", total=given)
        tally.add_mean("tools/call_frequency", total=talk.num_calls)
        tally.add_mean("tools/failure_frequency", total=talk.num_failed, count=talk.num_calls)
    return tally


def _staleness(rollout: Rollout) -> Tally:
    """Tally by how many weight pushes completions are older than what learns from them."""
    tally = Tally()
    ages = [rollout.policy_version - c.oldest_version for c in rollout.completions]
    for age in ages:
        tally.add_mean("rollout/staleness_mean", total=age)
        tally.add_max("rollout/staleness_max", age)
    for age in set(ages):
        tally.add_sum(f"rollout/num_staleness_{age}", ages.count(age))
    crossed = [c.began_under is not None for c in rollout.completions]
    tally.add_sum("rollout/num_crossed", sum(crossed))
    return tally


def _coverage_metrics(run: Run, old: OldScores) -> dict[str, float]:
    coverage = old.batch.coverage
    tokens = sum(len(sample.token_ids) for sample in old.batch.samples if sample.reported_here)
    routes = sum(m.routes.nbytes for m in old.batch.microbatches if m.routes is not None)
    parts = run.ranks.gather((coverage, routes, tokens))
    whole = Coverage.total(part for part, _, _ in parts)
    return {
        "replay/coverage": whole.fraction,
        "replay/bytes_per_token": sum(size for _, size, _ in parts)
        / sum(count for _, _, count in parts),
        **{f"replay/rows_live_{reason}": float(n) for reason, n in whole.num_live.items()},
    }


def _fault_metrics(run: Run) -> dict[str, float]:
    """Return the calls to rollout servers that have failed so far, over all ranks and by kind."""
    if not isinstance(run.engine, CountsFaults):
        return {}
    parts = run.ranks.gather(dict(run.engine.faults))
    return {f"rollout/faults_{kind}": float(sum(p[kind] for p in parts)) for kind in parts[0]}


def _notices(recipe: Recipe, metrics: Mapping[str, float]) -> dict[str, str]:
    """Return what is odd about a step, kind of notice -> text; usually nothing."""
    notices = {}
    unbegun = metrics.get("environment/dropped_ratio", 0.0)
    if unbegun > 0:
        notices["unbegun"] = (
            f"{100 * unbegun:.3g} % of the conversations never began: their prompts are longer than "
            f"data.max_prompt_length = {recipe.data.max_prompt_length} with what reset adds, and "
            "data.truncation is 'delete' (environment/dropped_ratio); they are not trained on"
        )
    aborted = metrics["completions/aborted_ratio"] - unbegun
    if aborted > 1e-9:
        notices["aborted"] = (
            f"the engine aborted {100 * aborted:.3g} % of the completions; they are recorded and not "
            "trained on"
        )
    if metrics["completions/clipped_ratio"] == 1:
        limit = recipe.rollout.max_completion_length
        end = (
            "grpo.overlong_filter omits them all from the loss"
            if recipe.grpo.overlong_filter
            else "none was seen to end by itself"
        )
        notices["cut"] = (
            f"every completion was cut at rollout.max_completion_length = {limit}, and {end}; raise "
            "it, or look at completions.jsonl: does the model know its end-of-sequence token?"
        )
    missing = metrics.get("dynamic_sampling/missing_groups", 0)
    if missing > 0:
        notices["few teach"] = (
            f"{recipe.grpo.max_resample_times} further rounds of prompts left {missing:g} of "
            f"{recipe.prompts_per_step} whose completions all have the same reward "
            "(dynamic_sampling/missing_groups): prompts are too easy or too hard, or "
            "grpo.max_resample_times is too low"
        )
    if metrics["update/num_skipped"] == recipe.batch.steps_per_generation:
        notices["idle"] = f"nothing was learned in this step: {_why_idle(metrics)}"
    return notices | _loss_notices(recipe.grpo, metrics)


def _loss_notices(keys: GrpoSection, metrics: Mapping[str, float]) -> dict[str, str]:
    """Return what makes a key of the loss do something else than it was meant for."""
    notices = {}
    if metrics.get("rollout_correction/rejected_frac") == 1:
        notices["rejected"] = (
            f"grpo.rollout_importance_sampling_mode = {keys.rollout_importance_sampling_mode!r} "
            "rejected every token, so the policy term is 0; widen its limits, or look at "
            "rollout_correction/*: is the engine's model another one?"
        )
    is_wide = keys.clips_ratios and keys.epsilon_high > 0.05
    if keys.importance_sampling_level != "token" and is_wide:
        notices["range"] = (
            f"grpo.epsilon_high = {keys.epsilon_high} with importance_sampling_level = "
            f"{keys.importance_sampling_level!r} clips hardly anything: a sequence's ratio is a mean "
            "over its tokens. GSPO's paper sets epsilon = 3e-4 and epsilon_high = 4e-4"
        )
    return notices


def _why_idle(metrics: Mapping[str, float]) -> str:
    if metrics["completions/filtered_ratio"] == 1:
        return "the loss omits all completions (completions/filtered_ratio is 1)"
    if metrics["frac_reward_zero_std"] == 1:
        return (
            "in every group all rewards are equal (frac_reward_zero_std is 1); prompts that are too "
            "easy or too hard, or a reward function that always gives the same score"
        )
    return "no completion that counts has an advantage"
