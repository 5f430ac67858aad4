"""The end of a run: the exported model, and how the run ended, written down."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict

from moe_replay.errors import MoeReplayError
from moe_replay.grpo.export import write_export
from moe_replay.grpo.records import (
    END_FILE,
    EXPORT_FOLDER,
    FAILURE_FILE,
    RunEnd,
    RunFailure,
    report_command,
)
from moe_replay.grpo.run import Run
from moe_replay.recipe.bearer import without_secrets


def finish(run: Run) -> RunEnd:
    """Write the trained model if the recipe asks for it; say where all is and what to do next."""
    page = f"look at it: {report_command(run.directory)}"
    samples = f"what it wrote: {run.directory / 'completions.jsonl'}"
    more = f"train on: the same command with --run.max_steps {2 * run.recipe.run.max_steps}"
    # Another last step changes the schedule of the learning rate, and with it the run.
    lines = [page, samples]
    if run.recipe.optimizer.lr_scheduler == "constant":
        lines.append(more)
    if run.recipe.checkpoint.export:
        export = run.directory / EXPORT_FOLDER
        advice = (
            f"The checkpoint of step {run.step} is complete: free some space and start the same "
            "command again, which then only writes the export"
        )
        write_export(run.actor, run.recipe, export, advice=advice)
        if run.recipe.lora.exports_adapter:
            lines.append(f"results in {run.directory}, adapter for PEFT and vLLM in {export}")
        else:
            lines += [
                f"use it: moe-replay serve {export}",
                f"results in {run.directory}, trained model in {export}",
            ]
    else:
        lines.append(f"results in {run.directory}")
    if run.best is not None:
        best, folder = run.best, run.checkpoints.folder(run.best.step)
        lines.append(f"best {best.metric}: {best.value:.6g} after step {best.step}, in {folder}")
    run.reporter.finish("\n".join(lines))
    return write_end(run, stopped_by=None)


@contextlib.contextmanager
def noting_failure(run: Run) -> Iterator[None]:
    """Write down the error that ends the run, for whoever looks at its directory later."""
    try:
        yield
    except MoeReplayError as error:
        if run.process.rank == 0:
            failure = RunFailure(
                step=run.step,
                max_steps=run.recipe.run.max_steps,
                kind=type(error).__name__,
                message=without_secrets(str(error)),
            )
            with contextlib.suppress(OSError):
                (run.directory / FAILURE_FILE).write_text(json.dumps(asdict(failure)) + "\n")
                error.add_note(f"look at the run so far: {report_command(run.directory)}")
        raise


def write_end(run: Run, *, stopped_by: str | None) -> RunEnd:
    """Write down how the run ended, for programs that see a launcher's exit code, not ours."""
    end = RunEnd(step=run.step, max_steps=run.recipe.run.max_steps, stopped_by=stopped_by)
    if run.process.rank == 0:
        # A full disk must not turn a run that is saved into one that failed.
        with contextlib.suppress(OSError):
            (run.directory / END_FILE).write_text(json.dumps(asdict(end)) + "\n")
    return end
