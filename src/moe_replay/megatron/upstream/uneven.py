"""All-gather and reduce-scatter of tensors whose sizes differ between ranks, for gloo.

nccl does both; gloo refuses them. Each tensor is flattened and padded to the largest one.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


def _padded(tensor: torch.Tensor, numel: int) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    return torch.nn.functional.pad(flat, (0, numel - flat.numel()))


def all_gather(
    outputs: list[torch.Tensor],
    tensor: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> dist.Work | None:
    """Do `torch.distributed.all_gather`, also where the outputs have different shapes.

    An uneven gather is finished when this returns, whatever `async_op` says.
    """
    if len({output.shape for output in outputs}) == 1:
        return dist.all_gather(outputs, tensor.contiguous(), group=group, async_op=async_op)
    numel = max(output.numel() for output in outputs)
    gathered = [tensor.new_empty(numel) for _ in outputs]
    dist.all_gather(gathered, _padded(tensor, numel), group=group)
    for output, flat in zip(outputs, gathered, strict=True):
        output.copy_(flat[: output.numel()].view(output.shape))
    return None


def reduce_scatter(
    output: torch.Tensor,
    inputs: list[torch.Tensor],
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> dist.Work | None:
    """Do `torch.distributed.reduce_scatter`, also where the inputs have different shapes.

    An uneven scatter is finished when this returns, whatever `async_op` says.
    """
    if len({tensor.shape for tensor in inputs}) == 1:
        inputs = [tensor.contiguous() for tensor in inputs]
        return dist.reduce_scatter(output, inputs, op=op, group=group, async_op=async_op)
    numel = max(tensor.numel() for tensor in inputs)
    scattered = output.new_empty(numel)
    dist.reduce_scatter(
        scattered, [_padded(tensor, numel) for tensor in inputs], op=op, group=group
    )
    output.copy_(scattered[: output.numel()].view(output.shape))
    return None
