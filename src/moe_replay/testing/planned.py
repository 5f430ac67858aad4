"""A plan beside the truth: what a small policy really takes on the CPU, and what its plan says.

In: a case. Out: bytes of weights, gradients, optimizer state and peaks, measured and planned, on
each rank. Routes are replayed and dealt evenly, as a plan assumes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moe_replay.batch import Microbatch
from moe_replay.megatron.actor import MegatronActor
from moe_replay.megatron.chunks import unwrap
from moe_replay.megatron.families.family import ModelShape
from moe_replay.megatron.layout import ParallelLayout
from moe_replay.megatron.stages import stage_layers
from moe_replay.plan.trainer.kernels import CPU, Kernels
from moe_replay.plan.trainer.settings import AdamStorage, Settings
from moe_replay.plan.trainer.training import trainer_bytes
from moe_replay.recipe.sections.lora import LoraSection
from moe_replay.recipe.sections.training import MegatronSection
from moe_replay.routing import Origin, Routing, RoutingTrace
from moe_replay.testing.layouts import BLOCK, FULL, MOE, layout
from moe_replay.testing.memory import peak_bytes
from moe_replay.testing.policies import mean_loss, pack, start_policy
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.samples import RoutedSample, make_samples, with_trace
from moe_replay.testing.tiny_models import write_tiny_checkpoint

SEED = 7
_SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_attention_heads": 8,
    "vocab_size": 96,
    "max_position_embeddings": 4096,
}
_QWEN = _SIZES | {"num_experts": 16, "moe_intermediate_size": 48}
_DENSE_FIRST = _SIZES | {"moe_intermediate_size": 48, "intermediate_size": 160}
_LATENT = _DENSE_FIRST | {"num_key_value_heads": 8, "q_lora_rank": 40, "kv_lora_rank": 24}
_FLOAT_BYTES = 4
_STABLE_RUNS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedCase:
    """A model, a layout, its ranks, and the batch."""

    family: str = "qwen3_moe"
    """Of the tiny model."""
    fields: Mapping[str, Any] = field(default_factory=lambda: _QWEN)
    """Of its config."""
    layout: ParallelLayout = field(default_factory=ParallelLayout)
    """Degrees of parallelism."""
    ranks: int = 1
    """Processes."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """``recompute_*``."""
    max_tokens: int = 1024
    """Of a microbatch."""
    length: int = 128
    """Of each sequence."""
    chunk_rows: int = 256
    """Rows whose logits exist at a time."""
    lora: LoraSection = field(default_factory=LoraSection)
    """Adapters."""


CASES: Mapping[str, PlannedCase] = {
    "plain": PlannedCase(),
    "full recompute": PlannedCase(overrides=FULL),
    "moe recompute": PlannedCase(overrides=MOE),
    "block recompute": PlannedCase(overrides=BLOCK),
    "many words": PlannedCase(fields=_QWEN | {"vocab_size": 8192}),
    "wide": PlannedCase(fields=_QWEN | {"hidden_size": 256, "moe_intermediate_size": 128}),
    "long": PlannedCase(length=1024),
    "latent attention": PlannedCase(family="deepseek_v3", fields=_LATENT),
    "latent attention, full recompute": PlannedCase(
        family="deepseek_v3", fields=_LATENT, overrides=FULL
    ),
    "dense first": PlannedCase(family="glm4_moe", fields=_DENSE_FIRST),
    "few experts": PlannedCase(
        family="mixtral",
        fields=_SIZES | {"num_local_experts": 8, "intermediate_size": 96, "num_experts_per_tok": 2},
    ),
    "gated shared expert": PlannedCase(
        family="qwen2_moe", fields=_QWEN | {"shared_expert_intermediate_size": 80}
    ),
    "norms over all heads": PlannedCase(
        family="olmoe", fields=_SIZES | {"num_experts": 16, "intermediate_size": 48}
    ),
    "tp2": PlannedCase(layout=layout(tp=2), ranks=2),
    "ep2": PlannedCase(layout=layout(ep=2), ranks=2),
    "tp2 ep2": PlannedCase(layout=layout(tp=2, ep=2, etp=1), ranks=2),
    "pp2": PlannedCase(layout=layout(pp=2), ranks=2),
    "adapters": PlannedCase(lora=LoraSection(rank=8)),
}
"""Shapes and layouts that the formulas are compared in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """Bytes on a rank of one pipeline stage."""

    stage: int
    """Its number."""
    what: str
    """``weights``, ``gradients``, ``optimizer``, ``update`` or ``scoring``; the last two are peaks
    beyond the first three."""
    measured: int
    """Handed out by torch."""
    planned: float
    """By the formulas."""

    @property
    def error_frac(self) -> float:
        """How far the plan is off, in parts of the truth; negative when it says too little."""
        return self.planned / self.measured - 1


def compare(folder: Path, case: PlannedCase, kernels: Kernels = CPU) -> list[Compared]:
    """Build the policy of a case on its ranks, measure it, and plan it, for each pipeline stage.

    The checkpoint is written into ``folder``. Of ranks that hold the same, the lowest counts: what
    gloo's threads have not given back yet is no part of a plan.
    """
    checkpoint = write_tiny_checkpoint(folder, case.family, **dict(case.fields))
    found: dict[tuple[int, str], Compared] = {}
    for row in chain.from_iterable(run_ranks(_compare, case.ranks, checkpoint, case, kernels)):
        key = row.stage, row.what
        if key not in found or row.measured < found[key].measured:
            found[key] = row
    return list(found.values())


def _compare(checkpoint: Path, case: PlannedCase, kernels: Kernels) -> list[Compared]:
    """Do so on this rank; all ranks call this together."""
    actor = start_policy(
        checkpoint,
        case.layout,
        chunk_rows=case.chunk_rows,
        lora=case.lora,
        **dict(case.overrides),
    )
    stages = case.layout.pipeline_model_parallel_size
    # As many as stages, so that the first one keeps as many as it ever does.
    count = max(2, stages)
    microbatches = _evenly_routed(actor, case, count)
    shape = unwrap(actor.chunks[0]).model_shape
    settings = Settings(
        num_ranks=dist.get_world_size(),
        megatron=MegatronSection(**case.layout.model_dump(), **dict(case.overrides)),
        dtype_bytes=_FLOAT_BYTES,
        adam=AdamStorage(dtype_bytes=_FLOAT_BYTES),
        max_tokens=case.max_tokens,
        max_sequence_length=case.length,
        num_microbatches=count,
        chunk_rows=case.chunk_rows,
        lora=case.lora,
    )
    dealt = stage_layers(actor.config)
    first = unwrap(actor.chunks[0]).decoder.layers[0].layer_number - 1
    stage = next(number for number, layers in enumerate(dealt) if first in layers)
    planned = trainer_bytes(shape, settings, dealt, kernels)[stage]
    resident, passing = planned.resident, {"update": planned.update, "scoring": planned.scoring}

    def update() -> None:
        actor.update(microbatches, mean_loss, temperature=1.0, routing=Routing.REPLAY)

    def score() -> None:
        actor.score(microbatches, temperature=1.0, routing=Routing.REPLAY)

    # The first update makes the optimizer's state.
    update()
    held = {"weights": _weights, "gradients": _gradients, "optimizer": _optimizer}
    return [
        *(
            Compared(stage=stage, what=name, measured=read(actor), planned=getattr(resident, name))
            for name, read in held.items()
        ),
        *(
            Compared(stage=stage, what=name, measured=lowest_peak(run), planned=passing[name].total)
            for name, run in (("update", update), ("scoring", score))
        ),
    ]


def lowest_peak(run: Any) -> int:
    """Return the lowest of several peaks, until none of the ranks finds a lower one for a while.

    gloo's threads give buffers back when they come to it, which on a busy machine is late.
    """
    lowest = peak_bytes(run)
    runs_since = 0
    while dist.get_world_size() > 1 and runs_since < _STABLE_RUNS:
        found = peak_bytes(run)
        is_lower = torch.tensor([float(found < lowest)])
        dist.all_reduce(is_lower, op=dist.ReduceOp.MAX)
        runs_since = 0 if is_lower.item() else runs_since + 1
        lowest = min(lowest, found)
    return lowest


def _buffers(actor: MegatronActor) -> list[Any]:
    return [
        buffer
        for chunk in actor.chunks
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]
    ]


def _weights(actor: MegatronActor) -> int:
    frozen = (p for chunk in actor.chunks for p in chunk.parameters() if not p.requires_grad)
    in_buffers = sum(buffer.param_data.nbytes for buffer in _buffers(actor))
    return in_buffers + sum(parameter.nbytes for parameter in frozen)


def _gradients(actor: MegatronActor) -> int:
    return sum(buffer.grad_data.nbytes for buffer in _buffers(actor))


def _optimizer(actor: MegatronActor) -> int:
    """Return the bytes of the moments; a float32 weight is its own main weight."""
    optimizers = getattr(actor.optimizer, "chained_optimizers", [actor.optimizer])
    return sum(
        value.nbytes
        for optimizer in optimizers
        if optimizer.optimizer is not None
        for state in optimizer.optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value) and value.dim() > 0
    )


def _evenly_routed(actor: MegatronActor, case: PlannedCase, count: int) -> list[Microbatch]:
    """Return microbatches of which every expert gets equally many rows."""
    shape = unwrap(actor.chunks[0]).model_shape
    samples = make_samples(
        count * case.max_tokens // case.length,
        seed=SEED,
        vocab_size=min(99, shape.vocab_size),
        min_length=case.length,
        max_length=case.length,
    )
    routed: Sequence[RoutedSample] = [
        with_trace(sample, _even_trace(shape, sample.token_ids)) for sample in samples
    ]
    microbatches = pack(routed, max_tokens=case.max_tokens, scorer=actor)
    assert len(microbatches) == count
    return microbatches


def _even_trace(shape: ModelShape, token_ids: np.ndarray) -> RoutingTrace:
    """Return routes that go round the experts: token 0 to 0..K-1, token 1 to K..2K-1."""
    tokens, layers = np.arange(len(token_ids)), np.arange(shape.num_moe_layers)
    first = tokens[:, None, None] * shape.topk + layers[None, :, None]
    return RoutingTrace.record(
        (first + np.arange(shape.topk)) % shape.num_experts,
        token_ids=token_ids,
        valid=np.ones(len(token_ids), dtype=bool),
        layers=shape.moe_layers,
        num_experts=shape.num_experts,
        origin=Origin.single(
            engine="even", engine_version="0", policy_version=0, num_rows=len(token_ids)
        ),
    )
