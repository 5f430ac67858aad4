"""The training loop: the stations of a step in their order, and nothing else.

In: a recipe. Out: a run directory with metrics, completions, checkpoints and the exported model. Called by: cli.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from moe_replay.grpo.batching import make_batch
from moe_replay.grpo.closing import export_model, push_weights, save_checkpoint, step_record
from moe_replay.grpo.config import ProcessSpec, Recipe
from moe_replay.grpo.engines import recipe_engine
from moe_replay.grpo.learning import score_old, score_reference, update_policy
from moe_replay.grpo.opening import open_run
from moe_replay.grpo.records import Reporter
from moe_replay.grpo.sampling import evaluate, roll_out, score_rewards
from moe_replay.rollout.types import Engine


def train(
    recipe: Recipe,
    *,
    process: ProcessSpec,
    reporter: Reporter,
    restart: bool = False,
    make_engine: Callable[[Recipe, torch.device], Engine] = recipe_engine,
) -> None:
    """Run the recipe to its last step, resuming from the newest checkpoint in its output directory.

    Every rank of the run calls this. ``restart`` discards what the output directory holds.
    ``make_engine`` is called once with the recipe and the trainer's device; any `Engine` will do.

    Raises:
        MoeReplayError: of the kind that names what went wrong; the newest checkpoint stays usable.
    """
    with open_run(recipe, process, reporter, restart=restart, make_engine=make_engine) as run:
        reporter.start(run.summary())
        if run.step == 0:
            evaluate(run)
        while run.step < recipe.run.max_steps:
            run.begin_step()
            with run.station("rollout"):
                rollout = roll_out(run)
            with run.station("reward"):
                scored = score_rewards(run, rollout)
            with run.station("batch"):
                batch = make_batch(run, rollout, scored)
            with run.station("old_logprobs"):
                old = score_old(run, batch)
            with run.station("ref_logprobs"):
                reference = score_reference(run, old.batch)
            with run.station("update"):
                update = update_policy(run, old, reference)
            with run.station("sync"):
                push_weights(run)
            record, completions = step_record(run, rollout, scored, old, update)
            reporter.step(record, completions)
            if run.evaluation_is_due:
                evaluate(run)
            if run.checkpoint_is_due:
                with run.station("checkpoint"):
                    save_checkpoint(run)
        where = export_model(run)
        reporter.finish(where)
