"""Makes the state of a chained optimizer the same on ranks that hold different parts of a model."""

from __future__ import annotations

from typing import Any


def with_one_step(state: dict[Any, Any]) -> dict[Any, Any]:
    """Return the sharded state of an optimizer with the same step in every group of every part.

    Dense layers and experts have an optimizer part each, and all parts step together. On a pipeline
    stage without experts their part holds nothing and counts no steps, with torch's Adam as with
    Transformer Engine's. A checkpoint keeps the steps that the first rank knows: if its stage is
    one of those, a resume fails with torch's Adam, and with Transformer Engine's the experts of all
    other stages would begin at step 1 with old moments.

    Example:
        Steps ``3`` of the dense part and ``0`` of an empty one, which has never stepped, become
        ``3`` and ``3``.
    """
    # A chain of one part, which is what a dense model has, is that part's own state.
    parts = [state] if "optimizer" in state else list(state.values())
    groups = [group for part in parts for group in part["optimizer"]["param_groups"]]
    steps = [group["step"] for group in groups if group.get("step") is not None]
    for group in groups if steps else ():
        group["step"] = max(steps)
    return state
