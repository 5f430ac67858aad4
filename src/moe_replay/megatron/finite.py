"""Finds weights and optimizer state that overflowed, before they are saved or pushed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from megatron.core.optimizer import MegatronOptimizer

from moe_replay.errors import DivergedError, shortened
from moe_replay.megatron.chunks import unwrap
from moe_replay.megatron.ranks.messages import HostGroup

# The square of a float32 above 1.8e19 is infinite, and norms square what they are given: such a
# weight is lost as well.
_LARGEST_WEIGHT = 1e18


def check_weights(modules: Iterable[torch.nn.Module], ranks: HostGroup) -> None:
    """Raise unless all weights of the model, on all ranks, are finite and small enough; collective.

    Each tensor is read once, and the answers of all are fetched together.

    Raises:
        DivergedError: when one is infinite, NaN, or so large that its square is infinite.
    """
    _check(_weights(modules), "weights", _LARGEST_WEIGHT, ranks)


def typical_scale(modules: Iterable[torch.nn.Module]) -> float:
    """Return the median over this rank's matrices of their root mean square; 0 without any."""
    scales = [
        weight.detach().float().square().mean().sqrt()
        for _, weight in _weights(modules)
        if weight.dim() >= 2 and weight.numel()
    ]
    return float(torch.stack(scales).median()) if scales else 0.0


def check_optimizer(optimizer: MegatronOptimizer, ranks: HostGroup) -> None:
    """Raise unless Adam's moments and main weights, on all ranks, are finite; collective.

    A second moment that overflowed freezes its weight for ever, and the weight itself looks
    healthy.

    Raises:
        DivergedError: when a value is infinite or NaN.
    """
    _check(_moments(optimizer), "optimizer state", math.inf, ranks)


def _check(
    named: Iterable[tuple[str, torch.Tensor]],
    what: str,
    limit: float,
    ranks: HostGroup,
) -> None:
    bad = _beyond(named, limit)
    found = ranks.first(shortened(bad) if bad else None)
    if found is not None:
        rank, names = found
        raise DivergedError(
            f"after this update the {what} of rank {rank} are not finite, or too large to compute with: {names}. Training has diverged: nothing "
            "was saved or given to the engine, and the checkpoints from before are kept. Lower optimizer.lr or "
            "optimizer.clip_grad, look at grad_norm of the last steps in metrics.jsonl, and resume"
        )


def _beyond(named: Iterable[tuple[str, torch.Tensor]], limit: float) -> list[str]:
    """Return the names of tensors with a value not below ``limit``; NaN is below nothing."""
    names: list[str] = []
    ends: list[torch.Tensor] = []
    with torch.no_grad():
        for name, tensor in named:
            if tensor.is_floating_point() and tensor.numel():
                names.append(name)
                ends.append(torch.stack(torch.aminmax(tensor.detach())).float())
    if not ends:
        return []
    below = (torch.stack(ends).abs() < limit).all(dim=1).tolist()
    return [name for name, is_below in zip(names, below, strict=True) if not is_below]


def _weights(modules: Iterable[torch.nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    for module in map(unwrap, modules):
        yield from module.named_parameters()
        # Of the buffers only a router's bias is trained and exported.
        yield from (entry for entry in module.named_buffers() if "expert_bias" in entry[0])


def _moments(optimizer: MegatronOptimizer) -> Iterator[tuple[str, torch.Tensor]]:
    for number, part in enumerate(getattr(optimizer, "chained_optimizers", [optimizer])):
        inner = getattr(part, "optimizer", None)
        if inner is None:
            continue
        held = [weight for group in inner.param_groups for weight in group["params"]]
        for index, weight in enumerate(held):
            yield f"main weight {index} of optimizer {number}", weight
            for name, value in inner.state.get(weight, {}).items():
                if isinstance(value, torch.Tensor):
                    yield f"{name} {index} of optimizer {number}", value
