"""A small policy on the real Megatron-Core, and its samples packed as the trainer packs them.

In: a checkpoint. Out: an actor, microbatches, samples with the model's own routes. Called by: tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moe_replay.batch import Microbatch, Sample, build_microbatch, plan_microbatches
from moe_replay.megatron.actor import MegatronActor, OptimizerSettings, build_policy
from moe_replay.megatron.layout import ParallelLayout, initialize
from moe_replay.megatron.scorer import MegatronScorer, Routing

SETTINGS = OptimizerSettings(
    lr=1e-3,
    min_lr=0.0,
    lr_scheduler="constant",
    warmup_steps=0,
    num_steps=10,
    weight_decay=0.0,
    beta1=0.9,
    beta2=0.999,
    eps=1e-8,
    clip_grad=1.0,
)
"""Constant learning rate 1e-3, no weight decay."""


def start_policy(
    checkpoint: Path, *, dtype: torch.dtype = torch.float32, **recompute: Any
) -> MegatronActor:
    """Build the policy of ``checkpoint``, data-parallel over the ranks that exist; ``recompute_*`` as in Megatron."""
    initialize(ParallelLayout())
    return build_policy(
        checkpoint, ParallelLayout(), dtype=dtype, settings=SETTINGS, recompute=recompute
    )


def pack(samples: Sequence[Sample], *, max_tokens: int = 48) -> list[Microbatch]:
    """Pack samples into microbatches of at most ``max_tokens`` rows."""
    lengths = [len(sample.token_ids) for sample in samples]
    plan = plan_microbatches(lengths, max_tokens=max_tokens, max_samples=None)
    return [
        build_microbatch(key, [samples[position] for position in group])
        for key, group in enumerate(plan)
    ]


def with_own_routes(scorer: MegatronScorer, samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples with the routes that the model itself takes."""
    scored = scorer.score(pack(samples), temperature=1.0, routing=Routing.RECORD)
    return [replace(sample, trace=scored[sample.sample_id].trace) for sample in samples]


def mean_loss(microbatch: Microbatch, new_logprobs: torch.Tensor) -> torch.Tensor:
    """Return a loss in which every sampled token weighs the same, whatever the packing."""
    return -new_logprobs.sum() / 64


def gradients(actor: MegatronActor) -> dict[str, torch.Tensor]:
    """Return the accumulated gradient of every parameter."""
    return {
        name: getattr(parameter, "main_grad").clone()  # noqa: B009 - Megatron's own attribute
        for module in actor.modules
        for name, parameter in module.named_parameters()
    }
