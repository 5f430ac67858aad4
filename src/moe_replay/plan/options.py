"""Which options of a recipe no machine takes: names, types, and what replay refuses.

In: a recipe, the shape of its model, a machine. Out: nothing, or the refusal.
"""

from __future__ import annotations

from moe_replay.grpo.start.preflight import Preflight, ask_layout
from moe_replay.megatron.families.family import ModelShape
from moe_replay.plan.machine import Machine
from moe_replay.recipe.recipe import ProcessSpec, Recipe


def check_options(recipe: Recipe, shape: ModelShape, machine: Machine) -> None:
    """Refuse options of Megatron's that no machine takes; what only GPUs can answer is left out.

    Raises:
        MoeReplayError: the first option that the installed Megatron-Core does not have or take, or
            with which replay cannot be exact.
    """
    found = Preflight(recipe, ProcessSpec(world_size=machine.num_gpus), elsewhere=True)
    ask_layout(found, shape)
    found.refuse()
