"""Padding never counts: not in the loads of experts, not in the auxiliary loss, and that loss is the same in every layout.

Megatron-Core up to 0.19 applies the padding mask to the wrong dim when it counts loads for the expert bias: it raises,
or leaves out experts where there are as many rows. With a mask, the token count by which it weighs the auxiliary loss
is that of all ranks that share a sequence (its reduction works in place); 0.19 multiplies it by their number once more.

In: routers. Out: the same routers, mended. Called by: megatron.model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter


def count_tokens_only(routers: Iterable[TopKRouter], *, scaled_by_group: bool) -> None:
    """Mend these routers, and no other of the process.

    ``scaled_by_group`` says that this Megatron-Core multiplies the token count by the ranks that share a sequence.
    """
    for router in routers:
        mended: Any = router
        mended._apply_expert_bias = partial(_count_loads, mended._apply_expert_bias)
        if scaled_by_group:
            mended.attach_and_log_load_balancing_loss = partial(
                _attach_loss, mended.attach_and_log_load_balancing_loss, mended.tp_cp_group.size()
            )


def _count_loads(
    stock: Callable[..., None], routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None
) -> None:
    if padding_mask is not None:
        routing_map = routing_map & ~padding_mask.reshape(-1, 1)
    stock(routing_map)


def _attach_loss(
    stock: Callable[..., torch.Tensor],
    num_sharing: int,
    *args: Any,
    valid_token_count: int | torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    return stock(*args, valid_token_count=valid_token_count / num_sharing, **options)
