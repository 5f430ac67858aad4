"""Layer implementations that Megatron-Core lacks, or has only with Transformer Engine or Apex."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor


class RMSNorm(torch.nn.RMSNorm):
    """Normalise the last dim; unlike Megatron's torch norm it runs under sequence parallelism."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused: Any
    ) -> None:
        super().__init__(
            hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device()
        )
        # Megatron sums the gradients of marked weights over the ranks that hold different rows.
        marked: Any = self.weight
        marked.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[... hidden_size]`."""
        assert self.eps is not None
        return _rms_norm(x, self.weight, self.eps)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise over the last dim; on a CPU torch takes five steps, and eight for the gradient."""
    if x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    return _HostRMSNorm.apply(x, weight, eps)


class _HostRMSNorm(torch.autograd.Function):
    """``y = x s w`` with ``s = (mean(x^2) + eps)^-1/2``.

    For a gradient g of y that of w is the sum of ``g x s`` over rows, and that of x is
    ``s (g w - x s mean(g w x s))``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(len(weight)).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,), (x, weight, scale) = gradients, ctx.saved_tensors
        size = len(weight)
        unit = x * scale
        by_unit = (gradient * unit).reshape(-1, size)
        mean = by_unit.mv(weight).div_(size).view_as(scale)
        returned = (gradient * weight).addcmul_(unit, mean, value=-1).mul_(scale)
        return returned, by_unit.sum(0), None


class _AllHeadsRMSNorm(torch.nn.Module):
    """Normalise over all heads together, where Megatron's query and key norms work head by head."""

    def __init__(
        self, config: TransformerConfig, num_heads: int, head_dim: int, eps: float
    ) -> None:
        super().__init__()
        # `transformer_config` refuses what would let ranks share a head.
        assert num_heads % config.tensor_model_parallel_size == 0
        self.width, self.eps = num_heads * head_dim, eps
        self.is_cut = config.tensor_model_parallel_size > 1
        local = self.width // config.tensor_model_parallel_size
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(
            torch.ones(local, dtype=config.params_dtype, device=device)
        )
        if self.is_cut:
            set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[... heads head_dim]` over the last two dims of all tensor-parallel ranks."""
        if not self.is_cut:
            return _rms_norm(x.flatten(-2), self.weight, self.eps).view_as(x)
        local = x.flatten(-2).float()
        squares = local.square().sum(dim=-1, keepdim=True)
        # Summed over ranks forward and, because each rank uses the sum, backward too.
        total = copy_to_tensor_model_parallel_region(
            reduce_from_tensor_model_parallel_region(squares)
        )
        normed = local * torch.rsqrt(total / self.width + self.eps)
        return (normed.to(x.dtype) * self.weight).view_as(x)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> Any:
        """Return the weight as parts of one tensor of all heads."""
        held = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(held, prefix, {"weight": 0}, sharded_offsets)


class AllHeadsQueryNorm(_AllHeadsRMSNorm):
    """The query norm of OLMoE and MiniMax-M2."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused: Any
    ) -> None:
        super().__init__(config, config.num_attention_heads, hidden_size, eps)


class AllHeadsKeyNorm(_AllHeadsRMSNorm):
    """The key norm of OLMoE and MiniMax-M2."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused: Any
    ) -> None:
        super().__init__(config, config.num_query_groups, hidden_size, eps)


class ReplicatedLinear(torch.nn.Linear):
    """The down projections of latent attention, complete on each tensor-parallel rank for its rows.

    Megatron's local layers cut them instead and gather the result, and the backward of that gather
    drops what the other ranks' heads contribute to the shared rotary key: gradients are then
    silently wrong (0.16.1, relative error 0.4).
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        bias: bool,
        **_unused: Any,
    ) -> None:
        assert not bias, "no family here has a bias in these projections"
        super().__init__(
            input_size,
            output_size,
            bias=False,
            dtype=config.params_dtype,
            device=torch.cuda.current_device(),
        )
        marked: Any = self.weight
        marked.sequence_parallel = config.sequence_parallel

    def forward(self, input: Tensor) -> Any:
        """Return the product and, as Megatron's layers do, a bias that was not added: none."""
        return super().forward(input), None


class GroupedExperts(SequentialMLP):
    """Run all local gated experts in two grouped matrix products instead of a loop of small ones.

    Parameters, their names and their distributed-checkpoint layout are those of SequentialMLP. Each
    forward copies the local expert weights once, which is cheap next to the products for small
    experts and many rows; backward keeps the copy. Frozen weights are not copied: see `join`.
    """

    change: Callable[[Sequence[Any], Tensor, Tensor], Tensor | None] = staticmethod(
        lambda _layers, _rows, _ends: None
    )
    """(a linear layer of each expert, rows, ends of each expert's) -> what adapters add."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # No buffers: checkpoints and exports have the experts' own weights.
        self._joined: dict[str, Tensor] = {}

    def join(self) -> None:
        """Let frozen experts be views of one tensor a layer, which products then read as it is.

        Values that are later copied into the experts' weights arrive in it. It needs room for one
        of the two layers a second time while it runs.
        """
        for name in ("linear_fc1", "linear_fc2"):
            weights = [layer.weight for layer in self._layers(name)]
            assert not any(weight.requires_grad for weight in weights)
            joined = torch.stack([weight.detach() for weight in weights])
            for weight, view in zip(weights, joined, strict=True):
                weight.data = view
            self._joined[name] = joined

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Join again what another device or number format has moved apart."""
        moved = super()._apply(fn, recurse)
        if any(
            layer.weight.data_ptr() != part.data_ptr() or layer.weight.dtype != part.dtype
            for name, joined in self._joined.items()
            for layer, part in zip(self._layers(name), joined, strict=True)
        ):
            self.join()
        return moved

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
    ) -> tuple[Tensor, None]:
        """Return each row's expert output times its gate weight; rows arrive sorted by expert."""
        rows = permuted_local_hidden_states
        counts = torch.as_tensor(tokens_per_expert, device=rows.device)
        ends = counts.cumsum(0).to(torch.int32)
        weights = permuted_probs.unsqueeze(-1)
        both = self._product("linear_fc1", rows, ends)
        if self.config.add_bias_linear:
            both = both + self._biases("linear_fc1", counts, len(rows))
        inner = (self._gated(both) * weights).to(rows.dtype)
        out = self._product("linear_fc2", inner, ends)
        if self.config.add_bias_linear:
            out = out + (self._biases("linear_fc2", counts, len(rows)) * weights).to(out.dtype)
        return out, None

    def _gated(self, both: Tensor) -> Tensor:
        """Return the gated activation, clamped and offset as Megatron's MLP does it."""
        gate, up = both.chunk(2, dim=-1)
        limit = self.config.activation_func_clamp_value
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
        if self.config.glu_linear_offset:
            up = up + self.config.glu_linear_offset
        return self.config.activation_func(gate) * up

    def _biases(self, name: str, counts: Tensor, num_rows: int) -> Tensor:
        stacked = torch.stack([layer.bias for layer in self._layers(name)])
        return stacked.repeat_interleave(counts, dim=0, output_size=num_rows)

    def _layers(self, name: str) -> list[Any]:
        return [getattr(expert, name) for expert in self.local_experts]

    def _product(self, name: str, rows: Tensor, ends: Tensor) -> Tensor:
        layers = self._layers(name)
        weights = self._joined.get(name)
        if weights is None:
            weights = torch.stack([layer.weight for layer in layers])
        product = F.grouped_mm(rows, weights.transpose(1, 2), offs=ends)
        change = self.change(layers, rows, ends)
        return product if change is None else product + change
