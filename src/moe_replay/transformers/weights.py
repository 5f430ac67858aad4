"""Views on a built Hugging Face model by the names of its checkpoint, to push weights into it.

transformers fuses and renames tensors when it loads a checkpoint (the experts of a layer become one
tensor) and publishes the way back. Run on the model's own tensors with copies left out, that way
back yields, for every name on disk, a view on the memory that holds it: a push is then one copy
into each view.

In: a transformers model. Out: `checkpoint_views`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_replay.errors import UnsupportedError, shortened


def checkpoint_views(model: Any) -> Mapping[str, torch.Tensor]:
    """Return the tensors of a model's checkpoint by name, as views on the model's own memory.

    Raises:
        UnsupportedError: when the family's conversion computes new values, so that a tensor on disk
            has no memory of its own in the model.
    """
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
            f"({shortened(elsewhere)}) are computed from the model's, and {num_viewed} of {num_held} values were found"
        )
    return views


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
