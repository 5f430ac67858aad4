"""Arrays as callers hold them: numpy, nested lists, or tensors of torch on any device, made into numpy once at the border.

torch itself is never imported here: a tensor is known by what it can do.

In: whatever a caller holds. Out: numpy arrays.
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


def check_holds_ids(
    rows: Integer[np.ndarray, "..."], num_experts: int, *, where: str = "the routes"
) -> None:
    """Raise `TraceError` when the dtype of ``rows`` cannot hold every expert id, whatever is in it.

    An engine that narrowed the ids has wrapped those that did not fit: id 300 came as 44, which is a possible route.
    """
    largest = int(np.iinfo(rows.dtype).max)
    if largest < num_experts - 1:
        raise TraceError(
            f"{where}: routes came as {rows.dtype}, which ends at {largest}, of a model with {num_experts} experts; "
            "larger ids were wrapped on the way and cannot be distinguished from others: let the engine send a wider "
            "type (vLLM 0.22 or newer does), or correct num_experts"
        )
