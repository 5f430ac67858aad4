"""Weights in flight: a push is checked, rounded or read while it streams by, one tensor at a time.

In: named tensors, the facts of the model that receives them. Out: the same tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from moe_replay.checkpoint.facts import ModelFacts
from moe_replay.errors import DivergedError, EngineError, shortened


def lowered_weights(
    weights: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype, facts: ModelFacts
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each tensor in ``dtype``, unless its own is lower or engines keep it in float32.

    Engines round what they load to their own format, so rounding it here changes no output and
    halves what travels: 60 GB instead of 120 for 30B parameters that are trained in float32 and
    sampled in bfloat16. The tensors of `ModelFacts.float32_names` pass as they are: 16 different
    expert biases near 0.1 would become 2 in bfloat16.
    """
    for name, tensor in weights:
        lowers = tensor.is_floating_point() and tensor.element_size() > dtype.itemsize
        if lowers and name not in facts.float32_names:
            tensor = tensor.detach().to(dtype)
        yield name, tensor


def checked_weights(
    weights: Iterable[tuple[str, torch.Tensor]], facts: ModelFacts
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each tensor after checking its name and shape, and raise at the end if one is missing.

    Of tied tensors one name is enough; the first of them is passed on, and if more are given they
    must be equal.

    Raises:
        EngineError: when a name is unknown, repeated or missing, or a shape or tied tensors differ.
        DivergedError: when a tensor holds NaN or infinity.
    """
    yield from fitting_weights(finite_weights(weights), facts)


def fitting_weights(
    weights: Iterable[tuple[str, torch.Tensor]], facts: ModelFacts
) -> Iterator[tuple[str, torch.Tensor]]:
    """Do what `checked_weights` does without reading the values, except those of tied tensors.

    Raises:
        EngineError: as `checked_weights`.
    """
    seen: set[str] = set()
    tied: tuple[str, torch.Tensor] | None = None
    for name, tensor in weights:
        _check_weight(name, tensor, facts, seen)
        seen.add(name)
        if name in facts.tied_names:
            if tied is not None:
                if not torch.equal(tied[1], tensor):
                    raise EngineError(
                        f"weights {tied[0]} and {name} are tied in this model, but were pushed "
                        "with different values; untie the model, or push one of them"
                    )
                continue
            tied = (name, tensor)
        yield name, tensor
    missing = sorted(set(facts.weight_shapes) - seen - facts.tied_names)
    if facts.tied_names and tied is None:
        missing += sorted(facts.tied_names)
    if missing:
        raise EngineError(
            f"{len(missing)} of {len(facts.weight_shapes)} weights were not pushed: "
            f"{shortened(missing)}; a push replaces all weights, and these would have stayed those of "
            "the last policy"
        )


def _check_weight(name: str, tensor: torch.Tensor, facts: ModelFacts, seen: set[str]) -> None:
    shapes = facts.weight_shapes
    if name in seen:
        raise EngineError(f"weight {name} was pushed twice; each name must come once")
    shape = shapes.get(name)
    if shape is None and name in facts.tied_names:
        shape = next(shapes[other] for other in facts.tied_names if other in shapes)
    if shape is None:
        raise EngineError(
            f"weight {name} is not in this model's checkpoint, which has {len(shapes)} names such as "
            f"{shortened(sorted(shapes))}; push the names of the Hugging Face checkpoint that the engine "
            "loaded"
        )
    if shape != tuple(tensor.shape):
        raise EngineError(
            f"weight {name} was pushed with shape {list(tensor.shape)}, the engine's model has "
            f"{list(shape)}; the trainer's model and the engine's differ, or padding was not removed"
        )


def drain(weights: Iterator[tuple[str, torch.Tensor]], error: Exception) -> None:
    """Read a push to its end after it failed here: all ranks gather each tensor, and would wait."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    try:
        for _ in weights:
            pass
    except Exception as further:  # noqa: BLE001 - the seam: the export of weights
        error.add_note(f"the rest of the push failed too: {type(further).__name__}: {further}")


def finite_weights(
    weights: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each tensor after checking that it is finite, in one pass and without a copy.

    Raises:
        DivergedError: when a tensor holds NaN or infinity.
    """
    for name, tensor in weights:
        if tensor.is_floating_point() and tensor.numel():
            # Both ends are NaN if one value is. They come to the host together: a model has
            # thousands of tensors, and a device would stop for each end of each.
            ends = torch.aminmax(tensor.detach() if tensor.itemsize > 1 else tensor.float())
            if not all(map(math.isfinite, torch.stack(ends).tolist())):
                bad = int((~torch.isfinite(tensor.float())).sum())
                raise DivergedError(
                    f"weight {name} was pushed with {bad} of {tensor.numel()} values that are NaN "
                    "or infinite: the training has diverged; lower optimizer.lr, and resume from a "
                    "checkpoint before it"
                )
        yield name, tensor


def folder_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and tensor of the safetensors files in a folder, each mapped from its file.

    Raises:
        EngineError: when a file is not a safetensors file.
    """
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - a safetensors file is not a mapping
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise EngineError(
                f"{path.name} of a push is not a safetensors file: {error}; it was damaged in transit"
            ) from error
