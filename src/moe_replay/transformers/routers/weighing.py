"""Weights of experts for routers that do not choose by a top-k call; users add theirs here.

In: a router, its logits, expert ids. Out: weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, singledispatch
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import nn

from moe_replay.errors import UnsupportedError

Weigh = Callable[
    [Any, Float[torch.Tensor, "rows experts"], Int64[torch.Tensor, "rows topk"]],
    Float[torch.Tensor, "rows topk"],
]


@singledispatch
def weigh_experts(router: nn.Module, logits: Any, ids: Any) -> Any:
    """Return the weights ``[rows, topk]`` of experts ``ids`` from a router's live ``logits``.

    A router whose last choice among its experts is a top-k call needs nothing here: its own code
    weighs replayed experts. For another one, register the function by its class; the router must
    return ``(logits, weights, ids)``, and the function must give its live weights bit for bit at
    its live ids, which every scope checks.

    Examples:
        >>> @weigh_experts.register
        ... def _(router: MyRouter, logits, ids):
        ...     return logits.sigmoid().gather(1, ids)

    Raises:
        UnsupportedError: when nothing is registered for the class of the router.
    """
    raise UnsupportedError(
        f"no function is registered that weighs the experts of a {type(router).__name__}"
    )


def weighing_of(router: nn.Module) -> Weigh | None:
    """Return the function that weighs the experts of this router; None where its own code does."""
    found = weigh_experts.dispatch(type(router))
    if found is not weigh_experts.dispatch(object):
        return found
    # By name, because importing a family for its class would load its whole module.
    return _weigh_sparsemixer if "PhimoeTopKRouter" in class_names(type(router)) else None


@lru_cache(maxsize=1024)
def class_names(kind: type) -> frozenset[str]:
    """Return the names of a class and its bases; FSDP2 puts a class of its own on top."""
    return frozenset(base.__name__ for base in kind.__mro__)


def _weigh_sparsemixer(router: Any, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Weigh each slot by a softmax over the experts near its own, without those of earlier slots.

    The order of the slots counts.

    Source: transformers 5, `sparsemixer` of PhiMoE, outside training.
    """
    if router.training:
        raise UnsupportedError(
            "the sparsemixer router of PhiMoE draws its experts at random in training mode, where replay has no "
            "weights for given ones; call eval() on its routers (their weights still get gradients)"
        )
    scores, weights = logits, []
    for slot in range(ids.shape[1]):
        expert = ids[:, slot : slot + 1]
        with torch.no_grad():
            best = scores.gather(1, expert)
            factor = logits.abs().clamp(min=best)
            is_far = ((best - logits) / factor) > 2 * router.router_jitter_noise
        near = scores.masked_fill(is_far, float("-inf"))
        weights.append(torch.softmax(near, dim=-1).gather(1, expert))
        scores = scores.scatter(1, expert, float("-inf"))
    return torch.cat(weights, dim=-1)
