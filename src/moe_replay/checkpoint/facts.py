"""What trainer and engines must know about a checkpoint, read from its files without loading it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_replay.checkpoint.config import load_config, load_generation_config, refused_by_library
from moe_replay.checkpoint.files import SafetensorsCheckpoint
from moe_replay.checkpoint.fit import TIED, check_counts, check_fit, is_weight
from moe_replay.checkpoint.stop_tokens import stop_tokens
from moe_replay.checkpoint.tokenizer import find_tokenizer, num_known_ids
from moe_replay.routing import RoutedModel
from moe_replay.transformers.model_config import routed_of

# How its name ends in the checkpoints of every family that has one.
_EXPERT_BIAS = "e_score_correction_bias"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """The facts of a checkpoint that bound what an engine may be asked for and may answer."""

    vocab_size: int
    """Token ids are below this."""
    max_context_length: int
    """Maximum tokens of prompt and completion together that the model supports."""
    eos_ids: tuple[int, ...]
    """Tokens that end a completion, see `stop_tokens`; empty if the checkpoint names none."""
    routed: RoutedModel | None
    """Layers, experts and top-k of its routers; None for a dense model."""
    weight_shapes: Mapping[str, tuple[int, ...]]
    """Name of every weight on disk -> its shape: what a full push holds. Prediction layers are not
    trained, and belong to none."""
    tied_names: frozenset[str]
    """Names that share one tensor; a push holds at least one of them."""
    float32_names: frozenset[str] = frozenset()
    """Names that engines hold in float32 in any number format, because lower-precision checkpoints
    do."""
    num_known_ids: int | None = None
    """Ids from here on are unknown to the tokenizer; None without a tokenizer."""
    family: str = ""
    """The `model_type` of its config."""
    stacks_experts: bool = False
    """Whether the experts of a layer are one tensor on disk; ``weight_shapes`` has one name an
    expert anyway."""


def read_facts(model_dir: str | Path) -> ModelFacts:
    """Return the facts of a Hugging Face checkpoint directory.

    The routers are found in the model itself, built on the meta device, not computed from its
    config.

    Raises:
        RecipeError: config.json is missing or wrong.
        CheckpointError: the safetensors are missing, damaged, ambiguous, or not those of the
            config.
        UnsupportedError: the checkpoint is quantized, or of an architecture that transformers does
            not know.
    """
    from transformers import AutoModelForCausalLM

    model_dir = Path(model_dir)
    config = load_config(model_dir)
    with SafetensorsCheckpoint(model_dir) as checkpoint:
        shapes = dict(checkpoint.shapes)
        stacks_experts = any(stored.expert is not None for stored in checkpoint.stored.values())
        formats = {name: stored.dtype for name, stored in checkpoint.stored.items()}
    check_counts(shapes, config)
    with (
        refused_by_library(
            f"transformers cannot build a model from {model_dir / 'config.json'}",
            "restore the config of the original checkpoint",
        ),
        torch.device("meta"),
    ):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    check_fit(shapes, config, model)
    text = config.get_text_config()
    tokenizer = find_tokenizer(model_dir)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    return ModelFacts(
        vocab_size=text.vocab_size,
        max_context_length=text.max_position_embeddings,
        eos_ids=tuple(stop_tokens(load_generation_config(model_dir), config, tokenizer)),
        routed=routed_of(model),
        weight_shapes={name: shape for name, shape in shapes.items() if is_weight(name, config)},
        tied_names=TIED if tied else frozenset(),
        float32_names=_float32_names(formats),
        num_known_ids=num_known_ids(tokenizer) if tokenizer is not None else None,
        family=config.model_type,
        stacks_experts=stacks_experts,
    )


def _float32_names(formats: Mapping[str, str]) -> frozenset[str]:
    """Return the names that stay in float32, given name -> number format on disk.

    A checkpoint that is float32 throughout does not show which names engines keep in float32;
    expert biases are.
    """
    is_lower = any(dtype in ("BF16", "F16") for dtype in formats.values())
    return frozenset(
        name
        for name, dtype in formats.items()
        if dtype == "F32" and (is_lower or name.endswith(_EXPERT_BIAS))
    )


def checkpoint_tensors(model_dir: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights of a checkpoint directory by name, one at a time, as a push holds them.

    Raises:
        RecipeError: config.json is missing or wrong.
        CheckpointError: as `SafetensorsCheckpoint`.
    """
    config = load_config(model_dir)
    with SafetensorsCheckpoint(model_dir) as checkpoint:
        for name in checkpoint:
            if is_weight(name, config):
                yield name, checkpoint[name]
