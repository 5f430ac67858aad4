"""Tell from headers alone whether a checkpoint holds the tensors that its config calls for.

In: names and shapes on disk, a config, the model that transformers builds from it without memory. Out: nothing, or a
refusal that names what differs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from moe_replay.checkpoint.files import NOT_A_WEIGHT, has_usual_names, some, usual_parts
from moe_replay.errors import CheckpointError

TIED = frozenset({"lm_head.weight", "model.embed_tokens.weight"})
"""The two names of one tensor in a model that ties its output layer to its embedding."""

_IN_LAYER = re.compile(r"model\.layers\.(\d+)\..*")
_OF_EXPERT = re.compile(r"model\.layers\.\d+\..*\.experts\.(\d+)\..*")


def check_counts(shapes: Mapping[str, tuple[int, ...]], config: Any) -> None:
    """Compare the numbers of layers and experts on disk with the config's, before a model of its size is built.

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
    # Prediction layers may have been left out, and every layer may be dense.
    for pattern, expected, what in (
        (_IN_LAYER, {num_layers, num_layers + num_prediction}, "layers"),
        (_OF_EXPERT, {0, num_experts}, "experts a layer"),
    ):
        held = {int(match[1]) for match in map(pattern.fullmatch, shapes) if match}
        count = max(held, default=-1) + 1
        if count not in expected:
            raise CheckpointError(
                f"config.json calls for {max(expected)} {what}, the safetensors hold {count}; the two belong to "
                "different checkpoints, or a shard is missing"
            )


def check_fit(shapes: Mapping[str, tuple[int, ...]], config: Any, model: Any) -> None:
    """Compare every name and shape on disk with those of ``model``, built from ``config`` on the meta device.

    Raises:
        CheckpointError: a tensor is missing, unexpected, or of another shape.
    """
    if not has_usual_names(config.model_type):
        # Of these families transformers itself, which alone runs them, says what is missing.
        return
    needed = dict(_usual_shapes(model, config.model_type))
    num_prediction = getattr(config, "num_nextn_predict_layers", None) or 0
    got = {
        name: shape
        for name, shape in shapes.items()
        if not NOT_A_WEIGHT.fullmatch(name)
        and not is_prediction(name, config.num_hidden_layers, num_prediction)
    }
    if config.tie_word_embeddings:
        for name in TIED & got.keys():
            needed.setdefault(name, got[name])
        needed = {name: shape for name, shape in needed.items() if name in got or name not in TIED}
    what = f"a {config.model_type} model with {config.num_hidden_layers} layers"
    check_names(needed.keys(), got.keys(), what)
    for name, shape in needed.items():
        if got[name] != shape:
            raise CheckpointError(
                f"tensor {name} has shape {list(got[name])}, expected {list(shape)} from config.json; the two likely "
                "belong to different checkpoints"
            )


def check_names(needed: AbstractSet[str], got: AbstractSet[str], what: str) -> None:
    """Raise `CheckpointError` unless the names that a checkpoint holds are those that ``what`` needs."""
    for names, differs in ((needed - got, "is missing"), (got - needed, "has unexpectedly")):
        if names:
            raise CheckpointError(
                f"the checkpoint {differs} {len(names)} of the {len(needed)} tensors of {what}: {some(names)}. "
                "Its config.json likely belongs to another checkpoint, or a shard is missing."
            )


def is_prediction(name: str, num_layers: int, num_prediction_layers: int) -> bool:
    """Tell whether a tensor belongs to a multi-token-prediction layer, which follow the decoder layers."""
    match = _IN_LAYER.fullmatch(name)
    return match is not None and 0 <= int(match[1]) - num_layers < num_prediction_layers


def _usual_shapes(model: Any, model_type: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, tensor in model.state_dict().items():
        yield from usual_parts(name, tuple(tensor.shape), model_type)
