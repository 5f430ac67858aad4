"""The end of a run: the exported model, and how the run ended, written down."""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path

from moe_replay.errors import CheckpointError
from moe_replay.grpo.records import END_FILE, EXPORT_FOLDER, NEW_EXPORT, RunEnd
from moe_replay.grpo.run import Run
from moe_replay.megatron.lora.peft_files import save_adapter
from moe_replay.megatron.weights import save_hf_checkpoint


def finish(run: Run) -> RunEnd:
    """Write the trained model if the recipe asks for it; say where all is and what to do next."""
    samples = f"what it wrote: {run.directory / 'completions.jsonl'}"
    more = f"train on: the same command with --run.max_steps {2 * run.recipe.run.max_steps}"
    # Another last step changes the schedule of the learning rate, and with it the run.
    lines = [samples, more] if run.recipe.optimizer.lr_scheduler == "constant" else [samples]
    if run.recipe.checkpoint.export:
        export = run.directory / EXPORT_FOLDER
        _write_export(run, export)
        if run.exports_adapter:
            lines.append(f"results in {run.directory}, adapter for PEFT and vLLM in {export}")
        else:
            lines += [
                f"use it: moe-replay serve {export}",
                f"results in {run.directory}, trained model in {export}",
            ]
    else:
        lines.append(f"results in {run.directory}")
    run.reporter.finish("\n".join(lines))
    return write_end(run, stopped_by=None)


def write_end(run: Run, *, stopped_by: str | None) -> RunEnd:
    """Write down how the run ended, for programs that see a launcher's exit code, not ours."""
    end = RunEnd(step=run.step, max_steps=run.recipe.run.max_steps, stopped_by=stopped_by)
    if run.process.rank == 0:
        # A full disk must not turn a run that is saved into one that failed.
        with contextlib.suppress(OSError):
            (run.directory / END_FILE).write_text(json.dumps(asdict(end)) + "\n")
    return end


def _write_export(run: Run, export: Path) -> None:
    """Write the policy as a Hugging Face checkpoint, or its adapter as PEFT keeps one.

    An earlier export goes once the new one is complete.

    Raises:
        CheckpointError: when it cannot be written; the earlier export stays.
    """
    new = export.with_name(NEW_EXPORT)
    _remove(run, new)
    try:
        run.actor.gather_parameters()
        if run.exports_adapter and run.actor.adapters is not None:
            save_adapter(run.actor.adapters, run.recipe.lora, run.recipe.model.path, new)
        else:
            save_hf_checkpoint(
                run.actor.modules, run.recipe.model.path, new, read=run.actor.read_weight
            )
    except CheckpointError as error:
        _remove(run, new)
        raise CheckpointError(
            f"{error}. The checkpoint of step {run.step} is complete: free some space and start the "
            "same command again, which then only writes the export"
        ) from error
    if run.process.rank == 0:
        shutil.rmtree(export, ignore_errors=True)
        new.rename(export)
    run.ranks.barrier()


def _remove(run: Run, folder: Path) -> None:
    if run.process.rank == 0:
        for path in (folder, folder.with_name(f"{folder.name}.partial")):
            shutil.rmtree(path, ignore_errors=True)
    run.ranks.barrier()
