"""Check from headers alone that a checkpoint holds the tensors that its config requires."""

from __future__ import annotations

import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from moe_replay.checkpoint.files import NOT_A_WEIGHT
from moe_replay.checkpoint.stacked import has_usual_names, usual_parts
from moe_replay.errors import CheckpointError, shortened

TIED = frozenset({"lm_head.weight", "model.embed_tokens.weight"})
"""Both names of the shared tensor in a model that ties its output layer to its embedding."""

_IN_LAYER = re.compile(r"model\.layers\.(\d+)\..*")
_OF_EXPERT = re.compile(r"model\.layers\.\d+\..*\.experts\.(\d+)\..*")


def check_counts(shapes: Mapping[str, tuple[int, ...]], config: Any) -> None:
    """Compare layer and expert counts on disk with the config, before a model is built.

    Raises:
        CheckpointError: they differ.
    """
    if not has_usual_names(config.model_type):
        return
    num_layers = config.num_hidden_layers
    num_prediction = getattr(config, "num_nextn_predict_layers", None) or 0
    num_experts = next(
        number
        for key in ("num_experts", "num_local_experts", "n_routed_experts")
        if (number := getattr(config, key, None)) is not None
    )
    # Checkpoints may omit prediction layers, and every layer may be dense.
    for pattern, expected, what in (
        (_IN_LAYER, {num_layers, num_layers + num_prediction}, "layers"),
        (_OF_EXPERT, {0, num_experts}, "experts a layer"),
    ):
        held = {int(match[1]) for match in map(pattern.fullmatch, shapes) if match}
        count = max(held, default=-1) + 1
        if count not in expected:
            raise CheckpointError(
                f"config.json requires {max(expected)} {what}, the safetensors hold {count}; they belong to "
                "different checkpoints, or a shard is missing"
            )


def check_fit(shapes: Mapping[str, tuple[int, ...]], config: Any, model: Any) -> None:
    """Compare every name and shape on disk with ``model``, built from ``config`` without memory.

    Raises:
        CheckpointError: a tensor is missing, unexpected, or of another shape.
    """
    if not has_usual_names(config.model_type):
        # Only transformers runs these families, and it reports what is missing.
        return
    needed = {
        usual: part.shape
        for name, tensor in model.state_dict().items()
        for usual, part in usual_parts(name, tuple(tensor.shape), config.model_type)
    }
    got = {name: shape for name, shape in shapes.items() if is_weight(name, config)}
    if config.tie_word_embeddings:
        for name in TIED & got.keys():
            needed.setdefault(name, got[name])
        needed = {name: shape for name, shape in needed.items() if name in got or name not in TIED}
    what = f"a {config.model_type} model with {config.num_hidden_layers} layers"
    check_names(needed.keys(), got.keys(), what)
    for name, shape in needed.items():
        if got[name] != shape:
            raise CheckpointError(
                f"tensor {name} has shape {list(got[name])}, expected {list(shape)} from config.json; they likely "
                "belong to different checkpoints"
            )


def check_names(needed: AbstractSet[str], got: AbstractSet[str], what: str) -> None:
    """Raise `CheckpointError` unless a checkpoint has exactly the names that ``what`` needs."""
    missing, extra = needed - got, got - needed
    for names, differs in (
        (missing, f"is missing {len(missing)} of the {len(needed)} tensors of {what}"),
        (extra, f"has {len(extra)} tensors that do not belong to {what}"),
    ):
        if names:
            raise CheckpointError(
                f"the checkpoint {differs}: {shortened(sorted(names))}. "
                "Its config.json likely belongs to another checkpoint, or a shard is missing."
            )


def is_weight(name: str, config: Any) -> bool:
    """Return whether a tensor on disk is trained and given to engines.

    Those of prediction layers are not, and neither are constants that old checkpoints hold.
    """
    text = config.get_text_config()
    num_prediction = getattr(text, "num_nextn_predict_layers", None) or 0
    return not (
        NOT_A_WEIGHT.fullmatch(name) or is_prediction(name, text.num_hidden_layers, num_prediction)
    )


def is_prediction(name: str, num_layers: int, num_prediction_layers: int) -> bool:
    """Return whether a tensor belongs to a prediction layer.

    These follow the decoder layers, or have names of their own (ERNIE 4.5).
    """
    if num_prediction_layers and name.startswith("model.mtp_"):
        return True
    match = _IN_LAYER.fullmatch(name)
    return match is not None and 0 <= int(match[1]) - num_layers < num_prediction_layers
