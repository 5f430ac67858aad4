"""The process environment: which rank this is, and the variables that torch and vLLM read."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from moe_replay.errors import RecipeError
from moe_replay.recipe.recipe import ProcessSpec

_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

_EVERYWHERE = {
    # After a tokenizer has used its threads, it warns at every later fork.
    "TOKENIZERS_PARALLELISM": "false",
    # Spinning idle OpenMP threads would take cores from the other libraries of this process.
    "OMP_WAIT_POLICY": "PASSIVE",
    # vLLM in this process logs every step and reports usage to its developers.
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    # A server has threads, and a fork copies the locks that they hold.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # vLLM's ten minutes are too short for a large model on a slow disk; a crash is noticed at once.
    "VLLM_ENGINE_READY_TIMEOUT_S": "7200",
}
_ON_CPU = {
    # vLLM would bind its workers to NUMA nodes or cores, and every replica to the same ones.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Megatron-Core compiles its fused functions through torch.compile; on a CPU that only costs
    # start-up time.
    "TORCHDYNAMO_DISABLE": "1",
    # Experts see ever changing token counts, and each shape is a cache entry: oneDNN's 1024 thrash.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "10000",
    "LRU_CACHE_CAPACITY": "10000",
}


def read_process(environ: Mapping[str, str]) -> ProcessSpec:
    """Return this process's rank as set by torchrun; a single process without torchrun.

    Raises:
        RecipeError: only some of torchrun's variables are set, or they are not numbers.
    """
    present = [name for name in _TORCHRUN_VARIABLES if name in environ]
    if "RANK" not in present and "WORLD_SIZE" not in present:
        return ProcessSpec()
    missing = [name for name in _TORCHRUN_VARIABLES if name not in present]
    if missing:
        raise RecipeError(
            f"the environment sets {', '.join(present)}, but not {', '.join(missing)}: start with torchrun, or unset "
            "them to run one process"
        )
    try:
        return ProcessSpec(
            rank=int(environ["RANK"]),
            world_size=int(environ["WORLD_SIZE"]),
            local_rank=int(environ["LOCAL_RANK"]),
            launched_by_torchrun=True,
        )
    except ValueError as error:
        raise RecipeError(
            f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers: {error}; start with torchrun"
        ) from error


def set_defaults(environ: MutableMapping[str, str], *, num_workers: int = 1) -> None:
    """Set variables that torch reads on import, unless the user has; call it before that.

    ``num_workers`` processes will compute for this one on this machine; each gets a share of the
    cores.
    """
    defaults = dict(_EVERYWHERE)
    if not _has_gpu(environ):
        defaults |= _ON_CPU
    processes_here = int(environ.get("LOCAL_WORLD_SIZE", "1")) * num_workers
    cores = len(os.sched_getaffinity(0))
    defaults["OMP_NUM_THREADS"] = str(max(1, cores // processes_here))
    for name, value in defaults.items():
        environ.setdefault(name, value)


def _has_gpu(environ: Mapping[str, str]) -> bool:
    hidden = environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1")
    return Path("/dev/nvidiactl").exists() and not hidden
