"""Host memory of a node: what waits there during a step, and what a save gathers.

In: a recipe, the trainer's bytes of each stage, a machine. Out: HostBytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_replay.plan.machine import Machine
from moe_replay.plan.trainer.settings import Settings
from moe_replay.plan.trainer.training import Buffer, TrainerBytes
from moe_replay.recipe.recipe import Recipe

_STATE_BYTES = 12
"""Of a number's main weight and two moments in float32, as a save gathers them."""
_GATHER_BYTES = 12
"""Of a number of one of these three, as it came from the replicas and joined, and of the one joined
before it."""
GIVES_BACK = ("none", "gradients", "optimizer", "weights")
"""Values of ``megatron.offload_during_rollout``: each gives back what those before it do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostBytes:
    """Bytes on the host of the fullest node, everything at once."""

    state: float
    """Offloaded state, what was given back, and asleep engines."""
    save: float
    """What the ranks of a node gather and copy for a save."""

    @property
    def total(self) -> float:
        """Both."""
        return self.state + self.save


def host_bytes(
    recipe: Recipe,
    settings: Settings,
    trainer: Sequence[TrainerBytes],
    asleep: float,
    machine: Machine,
) -> HostBytes:
    """Return the bytes on a node's host; ``asleep`` are those of an engine there, a GPU."""
    given = gives_back(recipe)
    each = 0.0
    for found in trainer:
        held = found.resident
        moved = held.host + (held.optimizer if given >= 2 else 0.0)
        if given >= 3:
            moved += held.weights + held.reference
        each = max(each, moved)
    return HostBytes(
        state=(each + asleep) * machine.gpus_per_node,
        save=_saved_by_a_node(settings, trainer, machine, beside=recipe.checkpoint.asynchronous),
    )


def gives_back(recipe: Recipe) -> int:
    """Return how much the trainer frees while an engine samples: an index of `GIVES_BACK`."""
    return GIVES_BACK.index(recipe.megatron.offload_during_rollout)


def save_bytes(
    buffers: Sequence[Buffer], leads: Sequence[bool], *, weight_bytes: int, beside: bool
) -> float:
    """Return the most bytes that a rank has on its host during a save.

    ``buffers`` are gathered one after the other, each on its first replica: ``leads`` says of which
    this rank is that one. Each replica copies its share of main weights and moments; the first one
    takes, for all of them, the three that it gathers into, of one of them the parts that came and
    their join, and the join before that. What it has gathered stays until it is written, with
    ``beside`` from a copy.

    Example: 100 numbers of two replicas are 12 x 100 + 12 x 50 + 12 x 100 = 3,000 bytes on the
    first one, and 600 on the other.
    """
    kept = peak = 0.0
    for buffer, leads_it in zip(buffers, leads, strict=True):
        share = _STATE_BYTES * buffer.size / buffer.replicas
        whole = _STATE_BYTES * buffer.size if leads_it else 0
        joined = _GATHER_BYTES * buffer.size if leads_it else 0
        peak = max(peak, kept + whole + share + joined)
        kept += whole
    weights = sum(weight_bytes * buffer.size / buffer.replicas for buffer in buffers)
    return max(peak, kept * (2 if beside else 1) + weights)


def _saved_by_a_node(
    settings: Settings, trainer: Sequence[TrainerBytes], machine: Machine, *, beside: bool
) -> float:
    """Return what the ranks of the fullest node take together for a save.

    Megatron counts tensor-parallel ranks first, then context and expert ones, then replicas, then
    pipeline stages; so the first replicas are the first ranks of each stage.
    """
    layout = settings.layout
    per_stage = settings.num_ranks // len(trainer)
    place = np.arange(per_stage)
    leads = (
        place < layout.tensor_model_parallel_size,
        place < layout.expert_model_parallel_size * layout.expert_tensor_size,
    )
    on_ranks: list[np.ndarray] = []
    for found in trainer:
        sizes = np.zeros(per_stage)
        for pair in {(bool(a), bool(b)) for a, b in zip(*leads, strict=True)}:
            which = (leads[0] == pair[0]) & (leads[1] == pair[1])
            sizes[which] = save_bytes(
                found.buffers, pair, weight_bytes=settings.dtype_bytes, beside=beside
            )
        on_ranks.append(sizes)
    return float(np.concatenate(on_ranks).reshape(machine.num_nodes, -1).sum(axis=1).max())
