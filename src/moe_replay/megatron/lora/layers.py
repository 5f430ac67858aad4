"""Adapters of Megatron's linear layers, correct wherever those layers are cut.

An adapter adds ``scale * B A x`` to what its layer gives. Only the narrow product ``A x`` travels
between ranks, never the rows themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

Cut = Literal["rows", "columns", "none"]
"""What tensor parallelism cuts of a layer's weight: its rows (outputs), its columns (inputs)."""


class Switch:
    """Whether the adapters of a model add anything."""

    def __init__(self) -> None:
        self.is_on = True


class LoraPair(torch.nn.Module):
    """This rank's part of the two matrices of one projection."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        """Train ``a`` ``[rank, inputs]`` and ``b`` ``[outputs, rank]``."""
        super().__init__()
        self.lora_A = torch.nn.Parameter(a)
        self.lora_B = torch.nn.Parameter(b)


class LinearAdapter(torch.nn.Module):
    """The adapters of one linear layer: a pair for each projection of the checkpoint in it."""

    def __init__(
        self,
        pairs: Mapping[str, LoraPair],
        *,
        parts: Mapping[str, int],
        groups: int,
        cut: Cut,
        is_expert: bool,
        scale: float,
        switch: Switch,
        sequence_parallel: bool,
        group: dist.ProcessGroup,
    ) -> None:
        """Join pairs by the name of their projection.

        ``parts`` are all projections of the layer with the rows that this rank holds of each, in
        order; ``groups`` times they follow one another in the layer's weight. ``group`` are the
        ranks that ``cut`` refers to.
        """
        super().__init__()
        self.pairs = torch.nn.ModuleDict(pairs)
        self.parts, self.groups, self.cut = dict(parts), groups, cut
        self.is_expert, self.scale, self.switch = is_expert, scale, switch
        self.sequence_parallel, self.group = sequence_parallel, group

    def forward(self, rows: Tensor) -> Tensor:
        """Return what is added to the layer's output for its input ``[... inputs]``."""
        first = torch.cat([pair.lora_A for pair in self._pairs()])
        inner = self._meet(F.linear(rows, first)) * self.scale
        shares = inner.chunk(len(self.pairs), dim=-1)
        return self.joined(
            {
                name: F.linear(share, pair.lora_B)
                for share, (name, pair) in zip(shares, self._named(), strict=True)
            }
        )

    def joined(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """Lay outputs of projections side by side along the last dim, as the weight has its rows.

        Example: 2 groups of queries with 2 rows each, and a key and a value row each, are joined to
        ``q0 q0 k0 v0 q1 q1 k1 v1``. A projection without an adapter adds zeros.
        """
        some = next(iter(outputs.values()))
        columns = []
        for name, size in self.parts.items():
            width = size // self.groups
            output = outputs.get(name)
            columns.append(
                some.new_zeros(*some.shape[:-1], self.groups, width)
                if output is None
                else output.unflatten(-1, (self.groups, width))
            )
        return torch.cat(columns, dim=-1).flatten(-2) if len(columns) > 1 else some

    def weight_change(self) -> Tensor:
        """Return ``scale * B A`` in float32, of this rank's part and in the layer's own shape."""
        columns = {
            name: (pair.lora_A.float().t() @ pair.lora_B.float().t()) * self.scale
            for name, pair in self._named()
        }
        return self.joined(columns).t()

    def _meet(self, inner: Tensor) -> Tensor:
        """Bring ``A x`` to the ranks that go on with it.

        Where the layer's outputs are cut, each of its ranks needs ``A x`` of all rows, and the
        gradients of all of them meet in it; where its inputs are, each has only a term of the sum.
        """
        if self.cut == "rows":
            if self.sequence_parallel:
                return gather_from_sequence_parallel_region(
                    inner, tensor_parallel_output_grad=True, group=self.group
                )
            return copy_to_tensor_model_parallel_region(inner, group=self.group)
        if self.cut == "columns":
            if self.sequence_parallel:
                return reduce_scatter_to_sequence_parallel_region(inner, group=self.group)
            return reduce_from_tensor_model_parallel_region(inner, group=self.group)
        return inner

    def _named(self) -> list[tuple[str, Any]]:
        return list(self.pairs.items())

    def _pairs(self) -> list[Any]:
        return list(self.pairs.values())


def add_adapter(layer: Any, adapter: LinearAdapter) -> None:
    """Let a linear layer of Megatron add what its adapter gives, and own it."""
    layer.adapters = adapter

    def add(_module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        if not adapter.switch.is_on:
            return None
        product, bias = output
        return product + adapter(inputs[0]), bias

    layer.register_forward_hook(add)


def grouped_change(layers: Sequence[Any], rows: Tensor, ends: Tensor) -> Tensor | None:
    """Return what the adapters of experts add, in grouped products, or None where none does.

    ``layers`` are the same linear layer of each local expert, ``rows`` their inputs sorted by
    expert, ``ends`` where the rows of each end.
    """
    adapters = [layer.adapters for layer in layers if hasattr(layer, "adapters")]
    if not adapters or not adapters[0].switch.is_on:
        return None
    first = adapters[0]

    def stacked(name: str, matrix: str) -> Tensor:
        return torch.stack([getattr(each.pairs[name], matrix) for each in adapters])

    outputs = {}
    for name in first.pairs:
        inner = F.grouped_mm(rows, stacked(name, "lora_A").transpose(1, 2), offs=ends)
        outputs[name] = F.grouped_mm(
            inner * first.scale, stacked(name, "lora_B").transpose(1, 2), offs=ends
        )
    return first.joined(outputs)
