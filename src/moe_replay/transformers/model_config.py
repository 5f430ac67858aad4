"""What a Hugging Face model would route, found in a model built from its config without memory.

In: a config, or a checkpoint directory. Out: RoutedModel.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from moe_replay.errors import RecipeError, UnsupportedError
from moe_replay.routing import RoutedModel
from moe_replay.transformers.routers.sites import find_routers


def routed_model(config: Any) -> RoutedModel | None:
    """Return layers, experts and top-k of the model of ``config``; None when it is dense.

    ``config`` is a transformers config or the directory of a checkpoint. Nothing is downloaded and
    no code of a checkpoint runs. The numbers are read from the model, built without memory, and not
    computed from the config's fields.

    Raises:
        RecipeError: when the directory holds no config.json.
        UnsupportedError: when transformers has no such model, or its routes cannot be read at its
            routers.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if isinstance(config, str | os.PathLike):
        if not (Path(config) / "config.json").is_file():
            raise RecipeError(
                f"{config} holds no config.json; expected the directory of a Hugging Face checkpoint, or a config"
            )
        config = AutoConfig.from_pretrained(config, local_files_only=True, trust_remote_code=False)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise UnsupportedError(
            f"transformers builds no language model from a {type(config).__name__}: {error}"
        ) from error
    return routed_of(model)


def routed_of(model: Any) -> RoutedModel | None:
    """Return layers, experts and top-k of a built model; None when it is dense.

    Raises:
        UnsupportedError: when its routes cannot be read at its routers.
    """
    sites = find_routers(model)
    if not sites:
        return None
    return RoutedModel(
        moe_layers=tuple(site.layer for site in sites),
        num_decoder_layers=model.config.get_text_config().num_hidden_layers,
        num_experts=sites[0].num_experts,
        topk=sites[0].topk,
    )
