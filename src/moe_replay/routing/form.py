"""RouteForm: what the routes of one model have in common, and how wide their ids are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_replay.errors import TraceError


def expert_dtype(num_experts: int) -> np.dtype[Any]:
    """Return the dtype of expert ids: uint8 up to 256 experts, uint16 above.

    The dtype follows the model's expert count, never the largest id of a payload: samples of one
    batch must agree.
    """
    if not 2 <= num_experts <= 65_536:
        raise TraceError(
            f"num_experts is {num_experts}, expected 2 to 65536: routes need at least two experts to choose from "
            "and ids are stored in 16 bits"
        )
    return np.dtype(np.uint8 if num_experts <= 256 else np.uint16)


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class RouteForm:
    """What the routes of one model have in common."""

    layers: tuple[int, ...]
    """Global decoder-layer indices, strictly increasing."""
    num_experts: int
    """Routed experts a layer."""
    topk: int
    """Experts per token and layer."""

    @classmethod
    def common(cls, forms: Iterable[RouteForm], what: str) -> RouteForm:
        """Return the one form of all ``forms``; raise `TraceError` for none or several."""
        forms = set(forms)
        if len(forms) != 1:
            raise TraceError(
                f"{what}: traces of {len(forms)} forms {sorted(forms)}, expected one; they were "
                "recorded on several models, or some were restricted to fewer layers"
            )
        return forms.pop()
