"""A small policy on the real Megatron-Core, and its samples packed as the trainer packs them.

In: a checkpoint. Out: an actor, microbatches, samples with the model's own routes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_replay.batch import (
    Microbatch,
    RankPlace,
    Sample,
    build_microbatch,
    plan_microbatches,
)
from moe_replay.batch.packing import split_to
from moe_replay.megatron.actor import MegatronActor, build_policy
from moe_replay.megatron.chunks import unwrap
from moe_replay.megatron.layout import ParallelLayout, initialize
from moe_replay.megatron.logprobs import CHUNK_ROWS
from moe_replay.megatron.options.typed import MegatronOptions
from moe_replay.megatron.ranks.messages import HostGroup
from moe_replay.megatron.ranks.replica import Peer, Replica
from moe_replay.megatron.ranks.sharing import share_routes
from moe_replay.megatron.recorded import gather_traces
from moe_replay.megatron.scorer import MegatronScorer
from moe_replay.megatron.weights import export_hf_weights
from moe_replay.recipe.sections.lora import LoraSection
from moe_replay.recipe.sections.training import GivenBack, OptimizerSection
from moe_replay.routing import RouteForm, Routing
from moe_replay.testing.samples import RoutedSample, with_trace

SETTINGS = OptimizerSection(lr=1e-3)
"""Constant learning rate 1e-3, no weight decay."""
NO_LORA = LoraSection()
"""Trains the weights themselves."""


def start_policy(
    checkpoint: Path,
    layout: ParallelLayout | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    chunk_rows: int = CHUNK_ROWS,
    ddp: Mapping[str, Any] | None = None,
    optimizer: Mapping[str, Any] | None = None,
    gives_back: GivenBack = "none",
    grouped_experts: bool = False,
    settings: OptimizerSection = SETTINGS,
    lora: LoraSection = NO_LORA,
    **overrides: Any,
) -> MegatronActor:
    """Build the policy of ``checkpoint`` in ``layout``, data-parallel over the ranks that are left.

    Logits exist for ``chunk_rows`` token rows at a time. ``gives_back`` is
    ``megatron.offload_during_rollout``. ``overrides`` are further TransformerConfig fields, such as
    ``recompute_granularity``, ``ddp`` and ``optimizer`` those of DistributedDataParallelConfig and
    OptimizerConfig.
    """
    layout = layout or ParallelLayout()
    initialize(layout)
    return build_policy(
        checkpoint,
        layout,
        dtype=dtype,
        settings=settings,
        num_updates=10,
        grouped_experts=grouped_experts,
        options=MegatronOptions(transformer=overrides, ddp=ddp or {}, optimizer=optimizer or {}),
        chunk_rows=chunk_rows,
        gives_back=gives_back,
        lora=lora,
    )


def pack(
    samples: Sequence[Sample],
    *,
    max_tokens: int = 48,
    scorer: MegatronScorer | None = None,
    count: int = 0,
    row_multiple: int = 1,
    routed: bool = True,
) -> list[Microbatch]:
    """Pack samples into at least ``count`` microbatches of at most ``max_tokens`` tokens.

    The rows and layers are those of ``scorer``'s rank; without one, those of a single process. If
    ``routed``, the routes of samples that have some are shared as in training; with a ``scorer``
    that is collective over all ranks.
    """
    lengths = [len(sample.token_ids) for sample in samples]
    plan = split_to(
        plan_microbatches(lengths, max_tokens=max_tokens, max_samples=None), lengths, count
    )
    place = scorer.place if scorer else RankPlace()
    microbatches = [
        build_microbatch(
            key,
            [samples[position] for position in group],
            place=place,
            row_multiple=row_multiple,
        )
        for key, group in enumerate(plan)
    ]
    having = [sample for sample in samples if isinstance(sample, RoutedSample)]
    if not having or not routed:
        return microbatches
    replica = Replica.find(tuple(scorer.routers), place=place) if scorer else None
    return shared(microbatches, having, replica)


def shared(
    microbatches: Sequence[Microbatch],
    samples: Sequence[RoutedSample],
    replica: Replica | None = None,
) -> list[Microbatch]:
    """Bring each rank the routes that it replays, as training does: each has some traces.

    Without a ``replica`` this process is one, holds all rows and routes all layers.
    """
    replica = replica or lone_replica(samples[0].trace.layers)
    traces = {s.sample_id: s.trace for s in samples[replica.own :: replica.size]}
    routes = share_routes(replica, microbatches, traces)
    return [replace(m, routes=routes[m.key]) for m in microbatches]


def lone_replica(layers: Sequence[int], place: RankPlace = RankPlace()) -> Replica:  # noqa: B008 - frozen
    """Return a replica of this process alone, which routes ``layers`` in the rows of ``place``."""
    return Replica(
        number=0,
        num_replicas=1,
        peers=(Peer(place=place, layers=tuple(layers)),),
        own=0,
        computes_loss=True,
        is_last_stage=True,
        ranks=HostGroup(group=None, name="replica 0"),
        siblings=HostGroup(group=None, name="ranks of place 0"),
    )


def with_own_routes(
    scorer: MegatronScorer, samples: Sequence[Sample], *, max_tokens: int = 48
) -> list[RoutedSample]:
    """Return the samples with the routes that the model itself takes, whatever the layout."""
    microbatches = pack(samples, max_tokens=max_tokens, scorer=scorer)
    routes = scorer.score(microbatches, temperature=1.0, routing=Routing.RECORD).routes
    traces = gather_traces(
        microbatches, routes, route_form(scorer), policy_version=0, device=scorer.device
    )
    return [with_trace(sample, traces[sample.sample_id]) for sample in samples]


def route_form(scorer: MegatronScorer) -> RouteForm:
    """Return the layers, experts and top-k of the model, as its configuration states them."""
    shape = unwrap(scorer.chunks[0]).model_shape
    return RouteForm(layers=shape.moe_layers, num_experts=shape.num_experts, topk=shape.topk)


def mean_loss(microbatch: Microbatch, new_logprobs: torch.Tensor) -> torch.Tensor:
    """Return a loss in which every sampled token weighs the same, whatever the packing."""
    return -new_logprobs.sum() / 64


def gather_gradients(actor: MegatronActor) -> None:
    """Give every rank the whole reduced gradient of its parameters, in their buffers; collective.

    The distributed optimizer leaves each data-parallel rank with the sum of its own shard.
    """
    for chunk in actor.chunks:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            group = buffer.data_parallel_group
            if group.size() == 1:
                continue
            for bucket in buffer.buckets:
                shards = list(bucket.grad_data.chunk(group.size()))
                mine = shards[group.rank()].clone()
                dist.all_gather(shards, mine, group=group)


def gradients(actor: MegatronActor) -> dict[str, torch.Tensor]:
    """Return the reduced gradient of the model by checkpoint name, on every rank; collective."""
    gather_gradients(actor)

    def main_grad(parameter: Any) -> torch.Tensor:
        # An expert bias is a buffer and has no gradient.
        return getattr(parameter, "main_grad", torch.zeros_like(parameter))

    return {name: value.clone() for name, value in export_hf_weights(actor.modules, read=main_grad)}
