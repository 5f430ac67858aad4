"""The engine's bytes on a GPU: its weights, and what a token of its key-value cache takes.

In: ModelShape, the section of the rollout. Out: EngineBytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moe_replay.megatron.families.family import ModelShape
from moe_replay.plan.trainer.settings import NUMBER_BYTES
from moe_replay.plan.trainer.weights import LatentSizes, stage_weights
from moe_replay.recipe.sections.rollout import (
    EmbeddedEngineSection,
    RolloutSection,
    SamplingEngineSection,
    ServersEngineSection,
    VllmEngineSection,
)
from moe_replay.recipe.sections.training import ParallelLayout

VLLM_GPU_FRAC = 0.92
"""vLLM's own ``gpu_memory_utilization``."""
ENGINE_WORK_BYTES = 3e9
"""What vLLM needs beside weights and cache while it samples: activations, captured graphs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineBytes:
    """An engine on one GPU."""

    weights: float
    """Its shard of the model."""
    work: float
    """Activations and captured graphs."""
    cache: float
    """Its key-value cache."""
    token_bytes: float
    """What a token takes of the cache."""
    num_ranks: int
    """GPUs that hold one engine together."""
    stays: float
    """Bytes that stay on the trainer's GPU while it learns."""
    host: float
    """Bytes of host memory while it sleeps."""
    shares_gpu: bool
    """Whether it samples on the trainer's GPUs."""

    def sequences(self, length: int) -> int:
        """Return how many sequences of a length the cache holds at once."""
        return int(self.cache / (self.token_bytes * length)) if self.token_bytes else 0


def cache_token_bytes(shape: ModelShape, num_ranks: int, number_bytes: int) -> float:
    """Return bytes a token takes of the cache on each of the ranks of an engine.

    Example: 4 key and value heads on 8 ranks: each holds one whole head, so that every head is held
    twice. Latent attention keeps the same compressed row on every rank.
    """
    if shape.megatron_fields.get("multi_latent_attention"):
        sizes = LatentSizes.of(shape)
        return shape.num_layers * (sizes.rank + sizes.rotary) * number_bytes
    groups = max(shape.num_query_groups, num_ranks) / num_ranks
    return 2 * shape.num_layers * groups * shape.head_dim * number_bytes


def engine_weights(shape: ModelShape, num_ranks: int, number_bytes: int) -> float:
    """Return the bytes of a model's shard on each of ``num_ranks`` ranks."""
    # Key and value heads are held more than once where there are fewer than ranks.
    spread = replace(shape, num_query_groups=max(shape.num_query_groups, num_ranks))
    layout = ParallelLayout(tensor_model_parallel_size=num_ranks)
    weights = stage_weights(spread, layout, range(shape.num_layers), 0)
    return sum(weight.total for weight in weights) * number_bytes


def engine_bytes(
    shape: ModelShape,
    rollout: RolloutSection,
    *,
    gpu_bytes: float,
    max_sequence_length: int,
    server_ranks: int | None = None,
) -> EngineBytes | None:
    """Return an engine's bytes on a GPU of ``gpu_bytes``; None where nothing samples, or unknown.

    ``server_ranks`` are the GPUs of one rollout server.
    """
    if not isinstance(rollout, SamplingEngineSection):
        return None
    number = NUMBER_BYTES[rollout.dtype]
    if isinstance(rollout, EmbeddedEngineSection):
        weights, token = engine_weights(shape, 1, number), cache_token_bytes(shape, 1, number)
        cache = token * max_sequence_length * rollout.max_batch_size
        return EngineBytes(
            weights=weights,
            work=0,
            cache=cache,
            token_bytes=token,
            num_ranks=1,
            stays=weights,
            host=0,
            shares_gpu=True,
        )
    ranks, gib, share = 1, None, VLLM_GPU_FRAC
    if isinstance(rollout, VllmEngineSection):
        ranks, gib = rollout.tensor_parallel_size, rollout.kv_cache_gib
        share = rollout.gpu_memory_utilization or share
    elif server_ranks is None:
        return None
    else:
        ranks = server_ranks
    weights = engine_weights(shape, ranks, number)
    is_server = isinstance(rollout, ServersEngineSection)
    cache = share * gpu_bytes - weights - ENGINE_WORK_BYTES if gib is None else gib * 2**30
    return EngineBytes(
        weights=weights,
        work=ENGINE_WORK_BYTES,
        cache=max(cache, 0.0),
        token_bytes=cache_token_bytes(shape, ranks, number),
        num_ranks=ranks,
        stays=0,
        host=0 if is_server else weights,
        shares_gpu=not is_server,
    )
