"""Write checkpoint tensors into a built Hugging Face model, without disk or a second copy.

transformers fuses and renames tensors when it loads a checkpoint (the experts of a layer become one
tensor) and publishes the way back. Run on the model's own tensors with copies left out, that way
back yields, for every name on disk, a view on the memory that holds it: a push is then one copy
into each view.

In: a transformers model, checkpoint tensors. Out: CheckpointViews.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moe_replay.errors import EngineError, UnsupportedError

# Names listed in a message; a wrong family makes thousands of them.
_MAX_NAMES = 8


class CheckpointViews:
    """The tensors of a model's checkpoint by name, as views on the model's own memory.

    Raises:
        UnsupportedError: when the family's conversion computes new values, so that a tensor on disk
            has no memory of its own in the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._views = _checkpoint_views(model)
        self._slots: dict[str, tuple[Any, ...]] = {
            name: (view.data_ptr(), view.shape, view.stride()) for name, view in self._views.items()
        }

    def copy(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace every tensor of the model by ``weights``, cast to the model's own dtype.

        Of tied tensors one name is enough; if more are given they must be equal. After an error the
        model holds a mixture of old and new weights.

        Raises:
            EngineError: when a name is unknown, given twice or missing, a shape differs, or tied
                tensors do.
        """
        written: dict[tuple[Any, ...], str] = {}
        seen: set[str] = set()
        with torch.no_grad():
            for name, tensor in weights:
                view = self._view(name, tensor)
                if name in seen:
                    raise EngineError(f"weight {name} was pushed twice; each name must come once")
                seen.add(name)
                slot = self._slots[name]
                if slot not in written:
                    view.copy_(tensor)
                    written[slot] = name
                elif not torch.equal(view, tensor.to(view)):
                    raise EngineError(
                        f"weights {written[slot]} and {name} share memory in this model (tied), but were pushed with "
                        "different values; untie the model, or push one of them"
                    )
        missing = [name for name, slot in self._slots.items() if slot not in written]
        if missing:
            raise EngineError(
                f"{len(missing)} of {len(self._views)} weights were not pushed: {_some(missing)}; a push replaces "
                "all weights, and these would have stayed those of the last policy"
            )

    def _view(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        view = self._views.get(name)
        if view is None:
            raise EngineError(
                f"weight {name} is not in this model's checkpoint, which has {len(self._views)} names such as "
                f"{_some(sorted(self._views))}; push the names of the Hugging Face checkpoint that the engine loaded"
            )
        if view.shape != tensor.shape:
            raise EngineError(
                f"weight {name} was pushed with shape {list(tensor.shape)}, the engine's model has "
                f"{list(view.shape)}; the trainer's model and the engine's differ, or padding was not removed"
            )
        return view


class _CopiesLeftOut(TorchDispatchMode):
    """Makes ``contiguous()`` and ``clone()`` return their input, so that parts stay views."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten.clone.default:
            return torch.ops.aten.alias.default(args[0])
        return func(*args, **(kwargs or {}))


def _checkpoint_views(model: Any) -> Mapping[str, torch.Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    held = model.state_dict()
    with _CopiesLeftOut():
        views = revert_weight_conversion(model, dict(held))
    storages = {tensor.untyped_storage().data_ptr() for tensor in held.values()}
    elsewhere = [
        name for name, view in views.items() if view.untyped_storage().data_ptr() not in storages
    ]
    num_held = sum(tensor.numel() for tensor in held.values())
    num_viewed = sum(view.numel() for view in views.values())
    if elsewhere or num_held != num_viewed:
        raise UnsupportedError(
            f"{type(model).__name__} cannot take weights in place: {len(elsewhere)} tensors of its checkpoint "
            f"({_some(elsewhere)}) are computed from the model's, and {num_viewed} of {num_held} values were found"
        )
    return views


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_MAX_NAMES])
    return shown if len(names) <= _MAX_NAMES else f"{shown} and {len(names) - _MAX_NAMES} more"
