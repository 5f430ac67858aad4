"""What vLLM is started with: the options that replay needs, and the memory of its cache."""

from __future__ import annotations

import json

import pytest

from moe_replay.engines.types import EngineDescription
from moe_replay.engines.vllm.startup import CPU_KV_CACHE_GIB, cache_memory, engine_options
from moe_replay.errors import RecipeError

GIB = 1 << 30


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"kv_cache_gib": 2.5}, {"kv_cache_memory_bytes": 5 * GIB // 2}),
        ({"gpu_memory_utilization": 0.6}, {"gpu_memory_utilization": 0.6}),
    ],
)
def test_e15_a_gpu_gets_vllms_own_cache_unless_a_key_is_given(given, expected):
    keys = {"kv_cache_gib": None, "gpu_memory_utilization": None, **given}
    assert cache_memory(is_cpu=False, **keys) == expected


def test_e15_a_cpu_gets_the_stated_default_or_what_is_given():
    default = cache_memory(is_cpu=True, kv_cache_gib=None, gpu_memory_utilization=None)
    given = cache_memory(is_cpu=True, kv_cache_gib=0.5, gpu_memory_utilization=None)
    assert default == {"kv_cache_memory_bytes": int(CPU_KV_CACHE_GIB * GIB)}
    assert given == {"kv_cache_memory_bytes": GIB // 2}


@pytest.mark.parametrize(
    ("is_cpu", "gib", "share", "message"),
    [
        (False, 1.0, 0.5, "give one of them"),
        (True, 1.0, 0.5, "give one of them"),
        (True, None, 0.5, "runs on a CPU here"),
    ],
)
def test_e15_memory_that_vllm_would_ignore_is_refused(is_cpu, gib, share, message):
    with pytest.raises(RecipeError, match=message):
        cache_memory(is_cpu=is_cpu, kv_cache_gib=gib, gpu_memory_utilization=share)


@pytest.mark.vllm
def test_the_options_can_be_sent_to_other_processes_and_are_fields_of_vllm(vllm_imported, tmp_path):
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

    description = EngineDescription(
        name="vllm",
        version="0.30.0",
        dtype="float32",
        records_routes=True,
        moe_layers=(0, 1),
        num_experts=16,
        topk=4,
        max_context_length=64,
    )
    options = engine_options(tmp_path, description, max_batch_size=4)
    assert json.loads(json.dumps(options)) == options
    for arguments in (EngineArgs(**options), AsyncEngineArgs(**options)):
        assert not arguments.trust_remote_code
        assert arguments.enable_return_routed_experts
