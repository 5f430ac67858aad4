"""One replay-free step of a policy with adapters, in any layout, and what it computed."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_replay.megatron.actor import MegatronActor
from moe_replay.megatron.ranks.replica import Replica
from moe_replay.recipe.sections.lora import LoraSection
from moe_replay.recipe.sections.training import ParallelLayout
from moe_replay.routing import Routing
from moe_replay.testing.layouts import replica_share
from moe_replay.testing.policies import gather_gradients, mean_loss, pack, start_policy
from moe_replay.testing.samples import make_samples

LORA = LoraSection(rank=4, alpha=8.0)
SCALE = 2.0
SEED = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one rank saw."""

    logprobs: dict[int, np.ndarray]
    """Sample id -> log-probabilities with the adapters."""
    without: dict[int, np.ndarray]
    """The same with the adapters switched off."""
    grad_norm: float
    """Before clipping."""
    gradients: dict[str, torch.Tensor]
    """Of every whole matrix."""
    pushed: dict[str, torch.Tensor]
    """What engines are given."""


def drawn(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a matrix that depends on its name and its shape alone; B is not 0."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + SEED)
    return torch.randn(shape, generator=generator) * 0.1


def logprobs(actor: MegatronActor, microbatches: list[Any]) -> dict[int, np.ndarray]:
    scored = actor.score(microbatches, temperature=0.9, routing=Routing.LIVE).samples
    return {sample_id: scores.token_logprobs for sample_id, scores in scored.items()}


def share(actor: MegatronActor) -> list[Any]:
    """Return this rank's microbatches."""
    replica = Replica.find(tuple(actor.routers), place=actor.place)
    samples = replica_share(make_samples(4, seed=SEED), replica)
    return pack(samples, scorer=actor, routed=False, count=min(2, len(samples)))


def only_measure(actor: MegatronActor) -> None:
    """Let the optimizer leave every weight as it is."""
    optimizer: Any = actor.optimizer

    def norm_only() -> tuple[bool, float, int]:
        optimizer.prepare_grads()
        return True, float(optimizer.get_grad_norm()), 0

    optimizer.step = norm_only


def adapted_step(
    checkpoint: Path,
    layout: ParallelLayout,
    overrides: dict[str, Any],
    plant: Callable[[MegatronActor], None] = lambda actor: None,
) -> Step:
    """Run the passes of a step whose adapters are all drawn."""
    actor = start_policy(checkpoint, layout, lora=LORA, **overrides)
    assert actor.adapters is not None
    actor.adapters.take_whole({n: drawn(n, s) for n, s in actor.adapters.shapes.items()})
    plant(actor)
    microbatches = share(actor)
    found = logprobs(actor, microbatches)
    with actor.adapters.off():
        without = logprobs(actor, microbatches)
    only_measure(actor)
    norm = actor.update(microbatches, mean_loss, temperature=0.9, routing=Routing.LIVE).norm
    gather_gradients(actor)
    pushed = dict(actor.weights.tensors())
    for matrix in actor.adapters.matrices:
        matrix.part.data = matrix.part.main_grad.clone()
    return Step(
        logprobs=found,
        without=without,
        grad_norm=norm,
        gradients=dict(actor.adapters.tensors()),
        pushed=pushed,
    )
