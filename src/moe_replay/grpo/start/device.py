"""What a recipe leaves to the device: decided once torch knows it, and kept with the run."""

from __future__ import annotations

from moe_replay.errors import UnsupportedError
from moe_replay.recipe.recipe import Recipe


def on_this_device(recipe: Recipe) -> Recipe:
    """Return the recipe with every ``auto`` decided for the device that torch finds here.

    Raises:
        RecipeError: as `Recipe.on_device`.
    """
    import torch

    return recipe.on_device("cuda" if torch.cuda.is_available() else "cpu")


def check_attention(dtype: str, *, transformer_engine: bool) -> None:
    """Refuse a number format in which packed microbatches have no attention kernel.

    ``transformer_engine`` says whether its layers are built here.

    Raises:
        UnsupportedError: float32 with Transformer Engine, whose flash and fused attention take
            16-bit numbers only, and whose unfused attention takes no packed batches.
    """
    if transformer_engine and dtype == "float32":
        raise UnsupportedError(
            'model.dtype is "float32", but Transformer Engine, which is installed here, has no attention kernel for packed '
            'batches in float32: set model.dtype = "bfloat16" (the default on a GPU; main weights stay float32 in the '
            "optimizer), or uninstall transformer-engine to train with torch's attention"
        )
