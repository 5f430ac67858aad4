"""What an engine adapter must know of a checkpoint, read from its files without loading it.

In: a checkpoint directory. Out: ModelFacts. Called by: rollout.vllm_engine, rollout.server_engine, rollout.embedded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_replay.errors import RecipeError
from moe_replay.routing import RoutedModel
from moe_replay.transformers.record import find_routers

_INDEX = "model.safetensors.index.json"
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """The numbers of a checkpoint that decide what an engine may be asked for and may answer."""

    vocab_size: int
    """Token ids are below this."""
    max_context_length: int
    """Most tokens that the model was made for, prompt and completion together."""
    eos_ids: tuple[int, ...]
    """End-of-sequence tokens; empty when the model names none."""
    routed: RoutedModel | None
    """Layers, experts and top-k of its routers; None for a dense model."""
    weight_shapes: Mapping[str, tuple[int, ...]]
    """Name of every tensor on disk -> its shape: what a full push holds."""
    tied_names: frozenset[str]
    """Names that share one tensor; a push holds at least one of them."""


def read_facts(model_dir: str | Path) -> ModelFacts:
    """Return the facts of a Hugging Face checkpoint directory.

    The routers are found in the model itself, built without memory, not computed from its config.

    Raises:
        RecipeError: when the directory holds no config or no safetensors.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    model_dir = Path(model_dir)
    if not (model_dir / "config.json").is_file():
        raise RecipeError(
            f"{model_dir} holds no config.json; an engine needs a Hugging Face checkpoint directory"
        )
    config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    text = config.get_text_config()
    with torch.device("meta"):
        sites = find_routers(AutoModelForCausalLM.from_config(config))
    shapes = dict(_shapes_on_disk(model_dir))
    tied = bool(getattr(config, "tie_word_embeddings", False))
    return ModelFacts(
        vocab_size=text.vocab_size,
        max_context_length=text.max_position_embeddings,
        eos_ids=eos_ids(_generation_config(model_dir), config),
        routed=RoutedModel(
            moe_layers=tuple(site.layer for site in sites),
            num_decoder_layers=text.num_hidden_layers,
            num_experts=sites[0].num_experts,
            topk=sites[0].topk,
        )
        if sites
        else None,
        weight_shapes=shapes,
        tied_names=frozenset({_HEAD, _EMBEDDING}) if tied else frozenset(),
    )


def eos_ids(generation_config: Any, config: Any) -> tuple[int, ...]:
    """Return the end-of-sequence tokens of a transformers model; its generation config goes before its config."""
    eos = getattr(generation_config, "eos_token_id", None)
    if eos is None:
        eos = config.get_text_config().eos_token_id
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (eos,)


def _generation_config(model_dir: Path) -> Any:
    from transformers import GenerationConfig

    if not (model_dir / "generation_config.json").is_file():
        return None
    return GenerationConfig.from_pretrained(model_dir, local_files_only=True)


def checkpoint_tensors(model_dir: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a checkpoint directory by name, one at a time.

    Raises:
        RecipeError: when the directory holds no safetensors.
    """
    from safetensors import safe_open

    for path in _weight_files(Path(model_dir)):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - the file is no mapping
                yield key, file.get_tensor(key)


def _shapes_on_disk(model_dir: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    from safetensors import safe_open

    for path in _weight_files(model_dir):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - the file is no mapping
                yield key, tuple(file.get_slice(key).get_shape())


def _weight_files(model_dir: Path) -> list[Path]:
    index = model_dir / _INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    if absent := [name for name in names if not (model_dir / name).is_file()]:
        raise RecipeError(
            f"{model_dir} holds no {', '.join(absent)}; expected a Hugging Face checkpoint saved as safetensors"
        )
    return [model_dir / name for name in names]
