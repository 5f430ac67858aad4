"""How many sequences a key-value cache holds at once, which decides the speed of a rollout.

In: the config of a vLLM that has started. Out: `CacheCapacity`, in numbers and in words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheCapacity:
    """What fits in a key-value cache."""

    num_sequences: int
    """Sequences of ``sequence_length`` tokens that are held at once, when they share no prefix."""
    sequence_length: int
    """Maximum number of tokens of a sequence, prompt and completion together."""
    max_batch_size: int
    """Sequences that the engine may sample at once."""

    def describe(self) -> str:
        """Return the figure as a line of a start-up summary."""
        return (
            f"{self.num_sequences:,} sequences of {self.sequence_length:,} tokens fit in vLLM's "
            f"key-value cache, {self.max_batch_size:,} are sampled at once"
        )

    def shortage(self) -> str | None:
        """Return a warning if fewer sequences fit than are sampled at once."""
        if self.num_sequences >= self.max_batch_size:
            return None
        return (
            f"vLLM's key-value cache holds {self.num_sequences:,} sequences of "
            f"{self.sequence_length:,} tokens, fewer than the {self.max_batch_size:,} of "
            "max_batch_size: the longest wait or are computed twice, which is slower and changes no "
            "result; raise gpu_memory_utilization (a GPU) or kv_cache_gib, or lower max_batch_size"
        )


@runtime_checkable
class HasCache(Protocol):
    """An engine that knows how many sequences it holds at once."""

    @property
    def capacity(self) -> CacheCapacity:
        """How many sequences the key-value cache holds at once."""
        ...


def capacity_of(vllm_config: Any) -> CacheCapacity:
    """Return what fits in the cache of a vLLM, by its own count of blocks.

    Example: 56 blocks of 32 tokens hold 11 sequences of 160 tokens, 5 blocks each.
    """
    concurrency = vllm_config.cache_config.kv_cache_max_concurrency
    assert concurrency is not None, "vLLM has not sized its cache yet"
    return CacheCapacity(
        num_sequences=int(concurrency),
        sequence_length=vllm_config.model_config.max_model_len,
        max_batch_size=vllm_config.scheduler_config.max_num_seqs,
    )
