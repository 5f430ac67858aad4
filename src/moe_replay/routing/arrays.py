"""Arrays as callers hold them (numpy, lists, tensors of torch), converted once at the border.

torch itself is never imported here: a tensor is known by what it can do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moe_replay.errors import TraceError

if TYPE_CHECKING:
    from jaxtyping import Integer, Shaped


def as_array(values: Any) -> Shaped[np.ndarray, "..."]:
    """Return ``values`` as a numpy array; a tensor of torch is detached and brought to the host."""
    if callable(getattr(values, "detach", None)) and callable(getattr(values, "cpu", None)):
        values = values.detach().cpu().numpy()
    return np.asarray(values)


def kept(array: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """Return an array of the same values that nobody writes to: itself if certain, or a copy.

    It is certain when the array and all that its memory belongs to are read-only: what `owned`
    returns, a slice of it, bytes, a file mapped for reading. An engine's buffer is not, and is
    copied: it will hold the next answer soon.
    """
    return array if _is_read_only(array) else owned(np.array(array))


def owned(array: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """Make a new array read-only and return it, so that `kept` does not copy it."""
    memory = array
    while isinstance(memory, np.ndarray):
        memory.flags.writeable = False
        memory = memory.base
    assert memory is None, "only an array that owns its memory can be given away"
    return array


def _is_read_only(array: Shaped[np.ndarray, "..."]) -> bool:
    memory: Any = array
    while isinstance(memory, np.ndarray):
        if memory.flags.writeable:
            return False
        memory = memory.base
    if memory is None:
        return True
    try:
        view = memoryview(memory)
    except TypeError:
        # Memory of a library that does not say who may write to it, such as a tensor's.
        return False
    # A read-only view of a bytearray is read-only for its holder alone.
    return view.readonly and (view.obj is memory or memoryview(view.obj).readonly)


def check_holds_ids(
    rows: Integer[np.ndarray, "..."], num_experts: int, *, where: str = "the routes"
) -> None:
    """Raise `TraceError` when the dtype of ``rows`` cannot hold every expert id, whatever is in it.

    An engine that narrowed the ids has wrapped those that did not fit: id 300 came as 44, which is
    a possible route.
    """
    largest = int(np.iinfo(rows.dtype).max)
    if largest < num_experts - 1:
        raise TraceError(
            f"{where}: routes came as {rows.dtype}, which ends at {largest}, of a model with {num_experts} experts; "
            "larger ids were wrapped on the way and cannot be distinguished from others: let the engine send a wider "
            "type (vLLM 0.22 or newer does), or correct num_experts"
        )
