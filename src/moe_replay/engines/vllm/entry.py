"""How a recipe opens vLLM in the trainer's process, and what would keep it from starting."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_replay.engines.registry import EngineUse
from moe_replay.engines.types import Engine
from moe_replay.recipe.sections.rollout import VllmEngineSection

if TYPE_CHECKING:
    from moe_replay.checkpoint.facts import ModelFacts


def open_engine(section: VllmEngineSection, use: EngineUse, **_: object) -> Engine:
    """Start vLLM on this rank, or on as many ranks together as one engine takes."""
    # Checks alone must work where vLLM is not installed.
    from moe_replay.engines.vllm.engine import VllmEngine

    return VllmEngine(
        use.model_dir,
        dtype=section.dtype,
        max_batch_size=section.max_batch_size,
        max_context_length=use.max_context_length,
        kv_cache_gib=section.kv_cache_gib,
        gpu_memory_utilization=section.gpu_memory_utilization,
        tensor_parallel_size=section.tensor_parallel_size,
        record_routes=use.record_routes,
    )


def check_engine(
    section: VllmEngineSection,
    use: EngineUse,
    facts: ModelFacts,
    *,
    num_ranks: int,
    num_attention_heads: int,
    **_: object,
) -> list[str]:
    """Refuse ranks that do not divide into engines, and a checkpoint that vLLM cannot load."""
    from moe_replay.engines.vllm.ranks import check_ranks
    from moe_replay.engines.vllm.startup import check_loadable

    check_ranks(section.tensor_parallel_size, num_ranks)
    check_loadable(facts, section.tensor_parallel_size, num_attention_heads=num_attention_heads)
    return []
