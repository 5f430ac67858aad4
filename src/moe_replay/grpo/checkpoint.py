"""The station that saves a run, and what a start loads again."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from moe_replay.grpo.ahead import ROLLOUT_FOLDER, begin_saving, save_groups
from moe_replay.grpo.engines import recipe_sampling
from moe_replay.grpo.export import write_export
from moe_replay.grpo.measured import measured_on
from moe_replay.grpo.records import EXPORT_FOLDER
from moe_replay.grpo.run import BestStep, Run
from moe_replay.megatron.checkpoint import RunPosition
from moe_replay.megatron.finite import check_optimizer


def save_checkpoint(run: Run) -> None:
    """Write everything that a resumed run needs, or begin to, with ``checkpoint.asynchronous``.

    Raises:
        DivergedError: when a value of the optimizer is not finite; nothing is written.
        CheckpointError: when it, or the one before that is still being written, cannot be written;
            earlier checkpoints stay.
    """
    began_at = time.monotonic()
    finish_saving(run)
    check_optimizer(run.actor.optimizer, run.ranks)
    position = RunPosition(
        step=run.step,
        policy_version=run.policy_version,
        next_prompt=run.next_prompt,
        identity=run.identity,
        scheduler=run.actor.scheduler.state_dict(),
        evaluation_is_owed=run.evaluation_is_owed,
        guard=run.guard.to_plain() if run.guard is not None else {},
        best=asdict(run.best) if run.best is not None else {},
        draws=run.mixture.draws(run.next_prompt) if run.mixture is not None else {},
    )
    if run.recipe.checkpoint.asynchronous:
        run.saving = run.checkpoints.begin(run.actor, position, beside=_rollout_writers(run))
        run.saving.start()
    else:
        run.checkpoints.save(run.actor, position, beside=_rollout_writers(run))
    run.saved_step = run.step
    if run.recipe.checkpoint.export_every_save:
        folder = run.directory / f"{EXPORT_FOLDER}-step-{run.step:06d}"
        write_export(run.actor, run.recipe, folder)
        if run.saving is None:
            _forget_exports(run)
    now = time.monotonic()
    run.saves.took(now - began_at, ended_at=now)


def _forget_exports(run: Run) -> None:
    """Remove exports of saves whose checkpoint is not kept any more."""
    if run.process.rank == 0:
        kept = {run.step, *run.checkpoints.steps()}
        for folder in run.directory.glob(f"{EXPORT_FOLDER}-step-*"):
            number = folder.name.rpartition("-")[2]
            if number.isdigit() and int(number) not in kept:
                shutil.rmtree(folder)
    run.ranks.barrier()


def finish_saving(run: Run, *, only_if_written: bool = False) -> None:
    """Make the checkpoint visible that is written beside the run, if there is one; collective.

    ``only_if_written`` leaves it alone while some rank still writes.

    Raises:
        CheckpointError: when it could not be written; earlier checkpoints stay.
    """
    if run.saving is None:
        return
    if only_if_written and not all(run.ranks.gather(run.saving.is_written)):
        return
    pending, run.saving = run.saving, None
    run.checkpoints.finish(pending)
    if run.recipe.checkpoint.export_every_save:
        _forget_exports(run)


def _rollout_writers(run: Run) -> list[Callable[[Path], None]]:
    """Return what writes the rollout that the next step will take, if one is held.

    With pushes in flight no run is like another, and a resumed one samples its first step again.
    """
    held = run.ahead.held
    if held is None or run.pushes_in_flight:
        return []
    position = run.next_prompt

    def begin(folder: Path) -> None:
        if run.ranks.rank == 0:
            begin_saving(
                folder / ROLLOUT_FOLDER,
                run.engine.description,
                recipe_sampling(run.recipe),
                policy_version=held[0].completions[0].policy_version,
                requests=range(position, position + run.recipe.prompts_per_step),
            )

    def write(folder: Path) -> None:
        save_groups(folder / ROLLOUT_FOLDER, held, rank=run.ranks.rank, num_ranks=run.ranks.size)

    return [begin, write]


def load_checkpoint(run: Run, step: int) -> None:
    """Bring the trainer to where the checkpoint of ``step`` was written; every rank calls this."""
    run.reporter.station(step, "loading the checkpoint")
    position = run.checkpoints.load(run.actor, step)
    run.step, run.next_prompt = position.step, position.next_prompt
    run.saved_step, run.evaluation_is_owed = position.step, position.evaluation_is_owed
    run.policy_version = position.policy_version
    if position.draws and run.mixture is not None and run.recipe.rollout.engine != "files":
        # Files were sampled for the positions that the recipe alone gives.
        run.mixture.go_on(position.next_prompt, position.draws)
    if position.best:
        _take_best(run, BestStep(**position.best))
    if run.guard is not None and position.guard:
        run.guard.restore(position.guard)


def _take_best(run: Run, best: BestStep) -> None:
    """Go on from the best evaluation so far, unless the run now measures something else."""
    settings = run.recipe.checkpoint
    asked = (settings.metric_for_best_model, settings.greater_is_better)
    kind = "greatest" if best.is_greatest else "smallest"
    earlier = f"the best model so far, after step {best.step}, had the {kind} {best.metric}"
    if asked != (best.metric, best.is_greatest):
        run.journal.warn(
            f"{earlier}; checkpoint.metric_for_best_model is {asked[0]!r} now and greater_is_better "
            f"{asked[1]}, so the search for the best starts again here"
        )
        return
    now = measured_on(run.recipe, run.inputs.held_out, best.metric)
    if best.measured_on and best.measured_on != now:
        run.journal.warn(
            f"{earlier}, {best.value:g}, on other held-out prompts or sampled or judged in another way "
            "than now ([eval], rollout.stop, [environment]), so the search for the best starts again here"
        )
    else:
        # A checkpoint of an earlier revision does not say what it was measured on.
        run.best = replace(best, measured_on=now)
