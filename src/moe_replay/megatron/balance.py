"""Padding never counts, neither in the loads of experts nor in the auxiliary loss of any layout.

Megatron-Core up to 0.19 applies the padding mask to the wrong dim when it counts loads for the
expert bias: it raises, or leaves out experts where there are as many rows. With a mask, the token
count by which it weighs the auxiliary loss is that of all ranks that share a sequence (its
reduction works in place); 0.19 multiplies it by their count again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter

_TRACE = 1e-12
"""Tokens; its square, by which Megatron divides, is far above the smallest float32."""


def count_tokens_only(routers: Iterable[TopKRouter], *, scaled_by_group: bool) -> None:
    """Fix these routers, and no other of the process.

    ``scaled_by_group`` says that this Megatron-Core multiplies the token count by the ranks that
    share a sequence.
    """
    for router in routers:
        fixed: Any = router
        fixed._apply_expert_bias = partial(_count_loads, fixed._apply_expert_bias)
        for name in ("_apply_aux_loss", "_apply_seq_aux_loss", "_apply_global_aux_loss"):
            setattr(fixed, name, partial(_never_of_nothing, getattr(fixed, name)))
        if scaled_by_group:
            fixed.attach_and_log_load_balancing_loss = partial(
                _attach_loss, fixed.attach_and_log_load_balancing_loss, fixed.tp_cp_group.size()
            )


def _count_loads(
    stock: Callable[..., None], routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None
) -> None:
    if padding_mask is not None:
        routing_map = routing_map & ~padding_mask.reshape(-1, 1)
    stock(routing_map)


def _never_of_nothing(
    stock: Callable[..., torch.Tensor],
    probs: torch.Tensor,
    scores: torch.Tensor,
    routing_map: torch.Tensor,
    *args: Any,
    **options: Any,
) -> torch.Tensor:
    """Compute an auxiliary loss of 0 where all rows are padding: divided by 0 tokens it is NaN.

    A trace of load in one row is below float32's last digit of any count, and the masked scores of
    padding make the loss and its gradient exactly 0. Asking whether there is a token would wait for
    the device.
    """
    loads = routing_map.to(torch.float32)
    loads[0] += _TRACE
    return stock(probs, scores, loads, *args, **options)


def _attach_loss(
    stock: Callable[..., torch.Tensor],
    num_sharing: int,
    *args: Any,
    valid_token_count: int | torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    return stock(*args, valid_token_count=valid_token_count / num_sharing, **options)


class BalancingLoss:
    """Sums the auxiliary loss of routers while they compute it, before its weight.

    Megatron keeps such a sum in the process; this one belongs to its routers alone.
    """

    def __init__(self, routers: Iterable[TopKRouter], *, num_layers: int) -> None:
        """Listen to the ``routers`` of this rank, of ``num_layers`` MoE layers in the model."""
        self._num_layers = num_layers
        self._total: torch.Tensor | None = None
        for router in routers:
            heard: Any = router
            heard.attach_and_log_load_balancing_loss = partial(
                self._hear, heard.attach_and_log_load_balancing_loss
            )

    def clear(self) -> None:
        """Begin a new sum."""
        self._total = None

    def mean(self, num_microbatches: int) -> float | None:
        """Return this rank's part of the mean over layers, microbatches and replicas, if any.

        A router sees the rows of its own rank: the parts of all ranks sum to the mean.
        """
        if self._total is None:
            return None
        replicas = parallel_state.get_data_parallel_world_size()
        return float(self._total) / (self._num_layers * num_microbatches * replicas)

    def _hear(
        self,
        stock: Callable[..., torch.Tensor],
        activation: torch.Tensor,
        weight: float,
        loss: torch.Tensor,
        *args: Any,
        **options: Any,
    ) -> torch.Tensor:
        part = loss.detach() / weight
        self._total = part if self._total is None else self._total + part
        return stock(activation, weight, loss, *args, **options)
