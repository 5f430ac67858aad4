"""The trained model as others load it, written whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path

from moe_replay.errors import CheckpointError
from moe_replay.grpo.records import NEW_EXPORT
from moe_replay.megatron.actor import MegatronActor
from moe_replay.megatron.lora.peft_files import save_adapter
from moe_replay.megatron.ranks.messages import all_ranks
from moe_replay.megatron.weights import save_hf_checkpoint
from moe_replay.recipe.recipe import Recipe

AFTER_FREEING = "Checkpoints stay: free some space and start the same command again to resume"


def write_export(
    actor: MegatronActor, recipe: Recipe, export: Path, *, advice: str = AFTER_FREEING
) -> None:
    """Write the policy as a Hugging Face checkpoint, or its adapter as PEFT keeps one.

    An earlier export goes once the new one is complete. ``advice`` says in a message what to do.
    Collective.

    Raises:
        CheckpointError: when it cannot be written; the earlier export stays.
    """
    new = export.with_name(NEW_EXPORT)
    _remove(new)
    try:
        actor.gather_parameters()
        if recipe.lora.exports_adapter and actor.adapters is not None:
            save_adapter(actor.adapters, recipe.lora, recipe.model.path, new)
        else:
            save_hf_checkpoint(actor.modules, recipe.model.path, new, read=actor.read_weight)
    except CheckpointError as error:
        _remove(new)
        raise CheckpointError(f"{error}. {advice}") from error
    if all_ranks().rank == 0:
        shutil.rmtree(export, ignore_errors=True)
        new.rename(export)
    all_ranks().barrier()


def _remove(folder: Path) -> None:
    if all_ranks().rank == 0:
        for path in (folder, folder.with_name(f"{folder.name}.partial")):
            shutil.rmtree(path, ignore_errors=True)
    all_ranks().barrier()
