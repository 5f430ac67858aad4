"""How many sequences fit is vLLM's own count, and is said in words when they are too few."""

from __future__ import annotations

import math

import pytest

from moe_replay.engines.vllm.capacity import CacheCapacity, HasCache
from moe_replay.testing.tiny_models import write_tiny_checkpoint


def test_e15_a_shortage_is_said_and_enough_room_is_not():
    few = CacheCapacity(num_sequences=7, sequence_length=1536, max_batch_size=64)
    assert few.describe() == (
        "7 sequences of 1,536 tokens fit in vLLM's key-value cache, 64 are sampled at once"
    )
    shortage = few.shortage()
    assert shortage is not None
    assert "7 sequences of 1,536 tokens, fewer than the 64 of max_batch_size" in shortage
    exact = CacheCapacity(num_sequences=64, sequence_length=1536, max_batch_size=64)
    assert exact.shortage() is None


@pytest.mark.vllm
@pytest.mark.parametrize("length", [40, 160])
def test_e15_the_sequences_that_fit_are_those_of_vllms_blocks(vllm_imported, tmp_path, length):
    from moe_replay.engines.vllm.engine import VllmEngine

    path = write_tiny_checkpoint(tmp_path / "a", num_hidden_layers=2)
    engine = VllmEngine(path, dtype="float32", kv_cache_gib=0.002, max_context_length=length)
    try:
        num_blocks = engine._vllm.vllm_config.cache_config.num_gpu_blocks
        # A block holds 32 tokens: 2 blocks for 40 tokens, 5 for 160.
        assert engine.capacity.num_sequences == num_blocks // math.ceil(length / 32) > 1
        assert engine.capacity.sequence_length == length
        assert isinstance(engine, HasCache)
    finally:
        engine.close()
