"""From the recipe's sections to the arguments under which the trainer builds its model and optimizer.

In: a recipe. Out: layout, dtypes, optimizer settings, TransformerConfig fields.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_replay.megatron.actor import OptimizerSettings
from moe_replay.megatron.layout import ParallelLayout
from moe_replay.recipe.recipe import Recipe

_CONFIG_FIELDS = (
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "recompute_modules",
    "moe_token_dispatcher_type",
    "moe_aux_loss_coeff",
)
TRAINER_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Number format of the recipe -> that of the parameters."""


def optimizer_settings(recipe: Recipe) -> OptimizerSettings:
    """Return the optimizer that ``[optimizer]`` asks for, its schedule counted in updates."""
    section = recipe.optimizer
    return OptimizerSettings(
        lr=section.lr,
        min_lr=section.min_lr,
        lr_scheduler=section.lr_scheduler,
        warmup_steps=section.warmup_steps,
        num_steps=recipe.run.max_steps * recipe.batch.steps_per_generation,
        weight_decay=section.weight_decay,
        beta1=section.beta1,
        beta2=section.beta2,
        eps=section.eps,
        clip_grad=section.clip_grad,
    )


def run_layout(recipe: Recipe) -> ParallelLayout:
    """Return the layout that ``[megatron]`` asks for."""
    section = recipe.megatron
    return ParallelLayout(**{name: getattr(section, name) for name in ParallelLayout.__slots__})


def override_fields(recipe: Recipe) -> dict[str, Any]:
    """Return the keys of ``[megatron]`` that are TransformerConfig fields of the same name."""
    section = recipe.megatron.model_dump(exclude_none=True)
    fields = {name: value for name, value in section.items() if name in _CONFIG_FIELDS}
    if "recompute_modules" in fields:
        fields["recompute_modules"] = list(fields["recompute_modules"])
    return fields
