"""The training loop: the stations of a step in their order, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack

import torch

from moe_replay.engines.types import Engine
from moe_replay.grpo.batch import make_batch
from moe_replay.grpo.checkpoint import finish_saving, save_checkpoint
from moe_replay.grpo.end import finish, noting_failure, write_end
from moe_replay.grpo.engines import recipe_engine
from moe_replay.grpo.evaluate import evaluate
from moe_replay.grpo.penalty import penalize
from moe_replay.grpo.push import push_weights
from moe_replay.grpo.record import step_record
from moe_replay.grpo.records import BaseReporter, RunEnd
from moe_replay.grpo.reward import rate_completions, score_groups
from moe_replay.grpo.rollout import await_next, begin_next, hold_saved, roll_out
from moe_replay.grpo.rounds import Rounds
from moe_replay.grpo.run import Run
from moe_replay.grpo.score import score_old, score_reference
from moe_replay.grpo.start.opening import open_run
from moe_replay.grpo.start.preflight import Preflight
from moe_replay.grpo.start.summary import run_summary
from moe_replay.grpo.stopping import StepDropped, StopRequest
from moe_replay.grpo.update import update_policy
from moe_replay.recipe.recipe import ProcessSpec, Recipe


def train(
    recipe: Recipe,
    *,
    process: ProcessSpec,
    reporter: BaseReporter,
    restart: bool = False,
    allow_changed: Collection[str] = (),
    make_engine: Callable[[Recipe, torch.device], Engine] = recipe_engine,
    stop: StopRequest | None = None,
    checked: Preflight | None = None,
) -> RunEnd:
    """Run the recipe to its last step, resuming from the newest checkpoint in its output directory.

    Every rank of the run calls this. ``restart`` discards what the output directory holds. A run
    whose inputs are not what its checkpoint was trained with is refused, except for the keys
    ``allow_changed``, such as ``optimizer.lr``. ``stop`` lets another thread, or a signal while
    `StopRequest.listening`, end the run early and saved. ``make_engine`` is called once with the
    recipe and the trainer's device; any `Engine` will do. ``checked`` is the recipe's `preflight`
    in this process, for a caller who has asked already.

    Raises:
        StopRequested: when it was asked to stop before it began.
        MoeReplayError: of the kind that names what went wrong; the newest checkpoint stays usable.
    """
    stop = StopRequest() if stop is None else stop
    with ExitStack() as closing:
        closing.callback(stop.close)
        if recipe.run.max_time is not None:
            stop.ask_after(recipe.run.max_seconds, f"run.max_time = {recipe.run.max_time}")
        # Nothing is lost by leaving here.
        with stop.breaking_off():
            run = closing.enter_context(
                open_run(
                    recipe,
                    process,
                    reporter,
                    restart=restart,
                    allow_changed=allow_changed,
                    make_engine=make_engine,
                    stop=stop,
                    checked=checked,
                )
            )
        closing.callback(run.leave_saving)
        closing.enter_context(noting_failure(run))
        reporter.start(run_summary(run))
        try:
            hold_saved(run)
            if run.evaluation_is_owed:
                evaluate(run)
            while run.goes_on():
                _take_step(run)
        except StepDropped:
            run.drop_step()
        is_stopped = run.agrees_to_stop()
        if is_stopped and run.saved_step != run.step:
            with run.station("checkpoint"):
                save_checkpoint(run)
        finish_saving(run)
        return write_end(run, stopped_by=run.stop.reason) if is_stopped else finish(run)


def _take_step(run: Run) -> None:
    run.begin_step()
    rounds = Rounds(run.recipe)
    while rounds.num_wanted:
        with run.station("rollout"):
            rollout = roll_out(run, rounds.num_wanted)
        begin_next(run)
        with run.station("reward"):
            rounds.add(rate_completions(run, rollout))
    rollout, scored = score_groups(run, rounds)
    run.keep_step()
    with run.station("batch"):
        batch = make_batch(run, rollout, scored)
    with run.station("old_logprobs"):
        old = score_old(run, batch)
    with run.station("ref_logprobs"):
        reference = score_reference(run, old.batch)
    old, scored = penalize(run, rounds, scored, old, reference)
    with run.station("update"):
        update = update_policy(run, old, reference)
    if not run.pushes_in_flight:
        await_next(run, pushes_first=True)
    with run.station("sync"):
        push_weights(run)
    record, completions = step_record(run, rollout, scored, update)
    run.reporter.step(record, completions)
    if run.evaluation_is_due:
        # Held-out prompts are sampled by one policy version, alone.
        await_next(run, pushes_first=False)
        evaluate(run)
    if run.checkpoint_is_due:
        with run.station("checkpoint"):
            save_checkpoint(run)
    else:
        finish_saving(run, only_if_written=True)
