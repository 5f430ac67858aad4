"""The stations that end a step: weights to the engine, the step's record, the checkpoint, and the export at the end.

In: what the stations before returned. Out: records, pushed weights, files.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict

from moe_replay.engines.types import CountsFaults
from moe_replay.grpo.kept import kept_completions
from moe_replay.grpo.metrics import Tally, completion_tally
from moe_replay.grpo.notices import step_notices
from moe_replay.grpo.records import END_FILE, CompletionRecord, RunEnd, StepRecord
from moe_replay.grpo.rollout import Rollout, Scored
from moe_replay.grpo.run import Run
from moe_replay.grpo.score import OldScores, Update, gap_of
from moe_replay.megatron.finite import check_optimizer, check_weights
from moe_replay.routing import Coverage


def push_weights(run: Run) -> None:
    """Give the updated weights to the engine, as a new policy version.

    Raises:
        DivergedError: when one of them is not a finite number; the engine keeps the old ones.
    """
    check_weights(run.actor.modules, run.ranks)
    run.policy_version += 1
    run.give_weights()


def step_record(
    run: Run, rollout: Rollout, scored: Scored, old: OldScores, update: Update
) -> tuple[StepRecord, list[CompletionRecord]]:
    """Collect the step's metrics over all ranks, and a record of the completions that are kept."""
    # What a dropped sample's log-probabilities are under wrong routes says nothing about the engine.
    dropped = old.judged.dropped_here(old.batch)
    own = [s for s in old.samples if s.sampled_here and s.sample_id not in dropped]
    endings = completion_tally(
        [len(completion.token_ids) for completion in rollout.completions],
        [completion.finish_reason for completion in rollout.completions],
        overlong_filter=run.recipe.grpo.overlong_filter,
    )
    tally = Tally.merge([gap_of(own, old.scored), endings])
    # Our engines never draw them; those of others may.
    unknown = sum(int((c.token_ids >= run.num_known_ids).sum()) for c in rollout.completions)
    tally.add_sum("completions/unknown_tokens", unknown)
    if run.recipe.rollout.stop:
        tally.add_sum("completions/tokens_cut_off", rollout.num_cut)
    for sample in own:
        entropies = old.scored[sample.sample_id].entropies
        tally.add_mean("entropy/mean", total=float(entropies.sum()), count=len(entropies))
    metrics = dict(scored.metrics) | run.merge(tally) | dict(update.metrics) | dict(old.metrics)
    metrics["policy_version"] = float(run.policy_version)
    if run.mode.replays:
        metrics |= _coverage_metrics(run, old)
    metrics |= _fault_metrics(run)
    everyone = kept_completions(
        run,
        rollout.prompts,
        rollout.places,
        rollout.groups,
        texts=scored.texts,
        rewards={name: scores.reshape(-1) for name, scores in scored.rewards.items()},
        totals=scored.totals.reshape(-1),
        advantages=scored.advantages,
        dropped=old.judged.dropped,
    )
    run.warn_of_changes(step_notices(run.recipe, metrics))
    record = StepRecord(
        step=run.step,
        metrics=metrics,
        seconds=run.take_seconds(),
        details={**update.details, **old.judged.details},
        warnings=run.take_warnings(),
    )
    return record, everyone


def save_checkpoint(run: Run) -> None:
    """Write everything that a resumed run needs.

    Raises:
        DivergedError: when the optimizer holds what is not a finite number; nothing is written.
        CheckpointError: when it cannot be written; earlier checkpoints stay.
    """
    check_optimizer(run.actor.optimizer, run.ranks)
    run.checkpoints.save(run.actor, run.position())
    run.saved_step = run.step


def stop_early(run: Run) -> RunEnd:
    """Save the run as it stands after its last finished step, for a start that goes on with it."""
    if run.saved_step != run.step:
        with run.station("checkpoint"):
            save_checkpoint(run)
    return _end(run, stopped_by=run.stop.reason)


def finish(run: Run) -> RunEnd:
    """Write the trained model if the recipe asks for it, and say where everything is and what to do next."""
    run.reporter.finish(export_model(run))
    return _end(run, stopped_by=None)


def _end(run: Run, *, stopped_by: str | None) -> RunEnd:
    """Write down how the run ended, for programs that see a launcher's exit code instead of ours."""
    end = RunEnd(step=run.step, max_steps=run.recipe.run.max_steps, stopped_by=stopped_by)
    if run.process.rank == 0:
        # A full disk must not turn a run that is saved into one that failed.
        with contextlib.suppress(OSError):
            (run.directory / END_FILE).write_text(json.dumps(asdict(end)) + "\n")
    return end


def export_model(run: Run) -> str:
    """Write the trained model as a Hugging Face checkpoint; return where the results are, and what to do next."""
    samples = f"what it wrote: {run.directory / 'completions.jsonl'}"
    more = f"train on: the same command with --run.max_steps {2 * run.recipe.run.max_steps}"
    # Another last step changes the schedule of the learning rate, and with it the run.
    after = [samples, more] if run.recipe.optimizer.lr_scheduler == "constant" else [samples]
    if not run.recipe.checkpoint.export:
        return "\n".join([*after, f"results in {run.directory}"])
    run.write_export()
    where = f"results in {run.directory}, trained model in {run.export_path}"
    return "\n".join([*after, f"use it: moe-replay serve {run.export_path}", where])


def _coverage_metrics(run: Run, old: OldScores) -> dict[str, float]:
    coverage = old.batch.coverage
    tokens = sum(len(sample.token_ids) for sample in old.samples if sample.sampled_here)
    parts = run.gather(
        [
            coverage.num_replayed,
            {str(reason): n for reason, n in coverage.num_live.items()},
            old.batch.route_bytes,
            tokens,
        ]
    )
    whole = Coverage.total(Coverage.from_counts(part[0], part[1]) for part in parts)
    return {
        "replay/coverage": whole.fraction,
        "replay/bytes_per_token": sum(part[2] for part in parts) / sum(part[3] for part in parts),
        **{f"replay/rows_live_{reason}": float(n) for reason, n in whole.num_live.items()},
    }


def _fault_metrics(run: Run) -> dict[str, float]:
    """Return the calls to rollout servers that have failed so far, over all ranks and by kind."""
    if not isinstance(run.engine, CountsFaults):
        return {}
    parts = run.gather(dict(run.engine.faults))
    return {f"rollout/faults_{kind}": float(sum(p[kind] for p in parts)) for kind in parts[0]}
